//! A queue in a worker's hands, and the requests of it that are begun and not finished.
//!
//! A device that finishes a request in [`Serve::serve`] never meets what is here. One that hands it on, to the kernel or to other
//! threads, answers [`Served::Later`] instead: the chain is put aside under the request's [`Ticket`], and stays until the device
//! comes back with that ticket ([`Slot::finish`]). The chain keeps guest memory mapped, so whoever moves data meanwhile moves it to
//! where it belongs, however long that takes.
//!
//! Chains are reused from request to request, the warmest first, so that a queue which never has more than a few requests in
//! hand never touches memory for more.

use std::mem;
use std::sync::Arc;

use crate::chain::Chain;
use crate::memory::Memory;
use crate::queue::{Queue, Token};
use crate::worker::{Attempt, BUDGET, Serve};
use crate::{inflight, metrics};

/// Most requests of one queue that are begun and not finished. More would only wait in another place, and each costs memory.
pub const HELD: usize = 256;

/// Requests of a batch that are shown together, after the first. See [`Queue::publish_early`].
const TOGETHER: u32 = 4;

/// What a device did with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It is done, and this many bytes were written into its chain.
    Done(u32),
    /// It is begun. The device finishes it with [`Slot::finish`].
    Later,
}

/// A request that is begun: its number among those of its queue, below [`HELD`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u16);

impl Ticket {
    /// The number, as an index into a table of the device's own.
    pub fn index(self) -> usize {
        self.0.into()
    }

    /// The ticket with this number.
    pub fn from_index(index: usize) -> Option<Ticket> {
        u16::try_from(index).ok().filter(|_| index < HELD).map(Ticket)
    }
}

/// A queue a worker holds, and the chain its requests are popped into.
#[derive(Debug)]
pub struct Slot {
    /// The queue.
    pub queue: Queue,
    /// Reused from request to request.
    pub chain: Chain,
    pub(super) pending: bool,
    held: Held,
}

impl Slot {
    pub(super) fn new(queue: Queue) -> Slot {
        let chain = queue.chain();
        let held = Held::new(queue.memory());
        // A kick may have been left out while nobody listened: look once.
        Slot { queue, chain, pending: true, held }
    }

    /// How many requests are begun and not finished.
    pub fn in_hand(&self) -> usize {
        self.held.count
    }

    /// Whether the next request could be begun. What a predecessor has left is begun one by one: should one of these requests be
    /// what ended it, then the others are not counted as if they were.
    fn has_room(&self) -> bool {
        self.held.count < HELD && !self.held.replaying
    }

    /// Serves what is available, chain by chain, until the ring is empty or the budget is used up, and shows the results as it
    /// goes. `true`: there is more.
    pub fn drain(&mut self, server: &mut (impl Serve + ?Sized)) -> bool {
        let index = self.queue.index();
        let mut left = BUDGET;
        loop {
            self.queue.disarm();
            let mut taken = 0_u32;
            while left > 0 && self.has_room() && server.can_serve(index) {
                let Some(token) = self.queue.pop(&mut self.chain) else { break };
                left = left.saturating_sub(self.chain.descriptors().into());
                self.serve(server, token);
                if taken.is_multiple_of(TOGETHER) {
                    self.queue.publish_early();
                }
                taken += 1;
            }
            server.settle(self);
            self.queue.publish();
            self.pending = false;
            // A request that comes now costs the guest no exit: kicks are not asked for yet.
            if left > 0 && left < BUDGET && self.held.count == 0 && server.can_serve(index) {
                let queue = &self.queue;
                if server.poller().is_some_and(|poller| poller.look(|| queue.has_more())) {
                    continue;
                }
            }
            // What could not be served must not keep the thread awake.
            let more = self.queue.arm();
            let ready = self.has_room() && server.can_serve(index);
            if left == 0 || !more || !ready {
                return more && ready;
            }
        }
    }

    fn serve(&mut self, server: &mut (impl Serve + ?Sized), token: Token) {
        let index = self.queue.index();
        let replayed = token.is_replayed();
        let served = if token.is_condemned() {
            condemn(&token, index);
            Served::Done(server.refuse(index, &self.chain))
        } else {
            let held = &self.held;
            server.serve(index, &self.chain, &mut Attempt { queue: &mut self.queue, token: &token, held })
        };
        match served {
            Served::Done(written) => {
                self.queue.note_written(&self.chain);
                self.queue.complete(token, written);
                if replayed {
                    self.queue.publish();
                }
            }
            Served::Later => self.held.put(token, &mut self.chain),
        }
    }

    /// Finishes a request: `answer` writes what there is to write into its chain, and gives the number of bytes written in all. The
    /// guest sees it with the next batch. A ticket that is not in hand is none of the guest's, and nothing happens.
    pub fn finish(&mut self, ticket: Ticket, answer: impl FnOnce(&Chain) -> u32) {
        let Some((token, chain)) = self.held.take(ticket) else { return };
        let written = answer(&chain);
        self.queue.note_written(&chain);
        self.held.give_back(chain);
        self.queue.complete(token, written);
        // There may be something that had no room before.
        self.pending = true;
    }

    /// The chain of a request that is begun.
    pub fn held(&self, ticket: Ticket) -> Option<&Chain> {
        self.held.get(ticket)
    }

    /// Looks at the queue again, before the worker waits for anything.
    pub fn wake(&mut self) {
        self.pending = true;
    }
}

fn condemn(token: &Token, index: u16) {
    metrics::CONDEMNED.add(index.into(), 1);
    tracing::error!(
        queue = index,
        head = token.head(),
        "A request has ended {} processes that served it: it is answered with an error",
        inflight::CONDEMNED
    );
}

/// The requests that are begun, by their tickets.
#[derive(Debug)]
pub(super) struct Held {
    memory: Arc<Memory>,
    places: Vec<Option<(Token, Chain)>>,
    /// Numbers that are free, the last used on top.
    free: Vec<u16>,
    spare: Vec<Chain>,
    count: usize,
    /// One of them was left by a predecessor.
    replaying: bool,
}

impl Held {
    fn new(memory: &Arc<Memory>) -> Held {
        let memory = Arc::clone(memory);
        Held { memory, places: Vec::new(), free: Vec::new(), spare: Vec::new(), count: 0, replaying: false }
    }

    /// The number of the next request.
    pub(super) fn next(&self) -> Ticket {
        let fresh = u16::try_from(self.places.len()).unwrap_or(u16::MAX);
        Ticket(self.free.last().copied().unwrap_or(fresh))
    }

    pub(super) fn get(&self, ticket: Ticket) -> Option<&Chain> {
        self.places.get(ticket.index())?.as_ref().map(|(_, chain)| chain)
    }

    /// Puts a request aside under [`Held::next`], and leaves another chain in its place.
    fn put(&mut self, token: Token, chain: &mut Chain) {
        let other = self.spare.pop().unwrap_or_else(|| Chain::new(Arc::clone(&self.memory), 0));
        self.replaying |= token.is_replayed();
        self.count += 1;
        let entry = Some((token, mem::replace(chain, other)));
        match self.free.pop().and_then(|number| self.places.get_mut(usize::from(number))) {
            Some(place) => *place = entry,
            None => self.places.push(entry),
        }
    }

    fn take(&mut self, ticket: Ticket) -> Option<(Token, Chain)> {
        let entry = self.places.get_mut(ticket.index())?.take()?;
        self.free.push(ticket.0);
        self.count -= 1;
        self.replaying &= !entry.0.is_replayed();
        Some(entry)
    }

    fn give_back(&mut self, chain: Chain) {
        self.spare.push(chain);
    }
}
