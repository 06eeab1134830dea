//! Orders from the control thread to the processors.
//!
//! An order has a number. A processor that sees a new number carries the order out, says so, and waits for the next,
//! unless the order was to run. The control thread gives an order, gets every processor out of the guest, and waits until
//! all have answered: after [`Gate::order`] of anything but [`Order::Run`] no processor runs, and the control thread may
//! change what processors look at.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::boot::Entry;
use crate::kvm::Kick;

/// A processor inside the guest leaves in microseconds; one that has not answered by then was unlucky with its signal.
const KICK_AGAIN: Duration = Duration::from_millis(20);

/// What processors have to do.
#[derive(Clone, Debug)]
pub enum Order {
    /// Stay out of the guest.
    Wait,
    /// Back to power-on state, then the registers of the entry.
    Reset(Entry),
    /// Run the guest.
    Run,
}

struct State {
    number: u64,
    order: Order,
    answered: usize,
    failure: Option<String>,
    kicks: Vec<Kick>,
}

/// The gate.
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// The number of the last order a processor has seen.
#[derive(Debug, Default)]
pub struct Ticket(u64);

impl Default for Gate {
    fn default() -> Self {
        let state = State { number: 0, order: Order::Wait, answered: 0, failure: None, kicks: Vec::new() };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A processor's thread has started.
    pub fn join(&self, kick: Kick) -> Ticket {
        self.state().kicks.push(kick);
        self.changed.notify_all();
        Ticket::default()
    }

    /// Waits until `count` processors have joined.
    pub fn gather(&self, count: usize) {
        let mut state = self.state();
        while state.kicks.len() < count {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// For processors: returns when the order is to run, and has carried out all others on the way.
    pub fn pass(&self, ticket: &mut Ticket, mut obey: impl FnMut(&Order) -> Result<(), String>) {
        let mut state = self.state();
        loop {
            if state.number != ticket.0 {
                ticket.0 = state.number;
                let order = state.order.clone();
                drop(state);
                let outcome = obey(&order);
                state = self.state();
                if let Err(reason) = outcome {
                    state.failure.get_or_insert(reason);
                }
                state.answered += 1;
                self.changed.notify_all();
                // A newer one may have come meanwhile.
                continue;
            }
            if matches!(state.order, Order::Run) {
                return;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// For processors: waits for an order that is newer than the ticket.
    pub fn rest(&self, ticket: &Ticket) {
        let mut state = self.state();
        while state.number == ticket.0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// For the control thread: gives an order and waits until every processor has carried it out.
    pub fn order(&self, order: Order) -> Result<(), String> {
        let mut state = self.state();
        let leaving = !matches!(order, Order::Run);
        state.number = state.number.wrapping_add(1);
        state.order = order;
        state.answered = 0;
        state.failure = None;
        self.changed.notify_all();
        while state.answered < state.kicks.len() {
            if leaving {
                state.kicks.iter().for_each(Kick::kick);
            }
            state = self.changed.wait_timeout(state, KICK_AGAIN).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.failure.take().map_or(Ok(()), Err)
    }
}
