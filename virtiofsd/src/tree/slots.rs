//! A table whose entries have numbers that are not used twice.
//!
//! A number is made of the place of the entry and of the place's generation, which changes each time it is filled anew. So the number
//! of something that is gone, or one that a guest made up, leads nowhere. Generations begin at one that is drawn when the process
//! starts: numbers of a process that was before this one lead nowhere, too.
//!
//! Places are made in blocks, so that a table which grows never moves.

/// Entries of a block.
const BLOCK: usize = 256;

/// No entry.
const NONE: u32 = u32::MAX;

/// A table.
#[derive(Debug)]
pub(crate) struct Slots<T> {
    blocks: Vec<Vec<Slot<T>>>,
    free: u32,
    count: u32,
    epoch: u32,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    /// The next free place, while this one is free.
    next: u32,
    value: Option<T>,
}

/// Where an entry is, and which of those that were there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) place: u32,
    pub(crate) generation: u32,
}

impl<T> Slots<T> {
    pub(crate) fn new(epoch: u32) -> Slots<T> {
        Slots { blocks: Vec::new(), free: NONE, count: 0, epoch: epoch.max(1) }
    }

    /// Entries.
    pub(crate) fn len(&self) -> u32 {
        self.count
    }

    /// Puts something in, unless there are `most` entries.
    pub(crate) fn insert(&mut self, value: T, most: u32) -> Option<Key> {
        if self.count >= most {
            return None;
        }
        let place = if self.free == NONE { self.grow()? } else { self.free };
        let slot = self.slot_mut(place)?;
        slot.generation = slot.generation.checked_add(1).unwrap_or(1);
        slot.value = Some(value);
        let (generation, next) = (slot.generation, slot.next);
        self.free = next;
        self.count = self.count.saturating_add(1);
        Some(Key { place, generation })
    }

    /// Puts something in under the key that it had elsewhere, in one of the first `most` places. `None`: it is none, or taken. Places that
    /// are passed over are free after [`Slots::settle`], which comes after the last.
    pub(crate) fn restore(&mut self, key: Key, value: T, most: u32) -> Option<()> {
        if key.place >= most || key.generation == 0 {
            return None;
        }
        while self.slot_mut(key.place).is_none() {
            self.grow()?;
        }
        let slot = self.slot_mut(key.place).filter(|slot| slot.value.is_none())?;
        slot.generation = key.generation;
        slot.value = Some(value);
        self.count = self.count.saturating_add(1);
        Some(())
    }

    /// Begins anew, with other numbers than before, and gives the room back.
    pub(crate) fn renew(&mut self) {
        *self = Slots::new(self.epoch.wrapping_add(1 << 28));
    }

    /// Every place that is not taken is free.
    pub(crate) fn settle(&mut self) {
        let mut free = NONE;
        for (place, slot) in (0..).zip(self.blocks.iter_mut().flatten()) {
            if slot.value.is_none() {
                slot.next = std::mem::replace(&mut free, place);
            }
        }
        self.free = free;
    }

    /// All entries, with their keys.
    pub(crate) fn all(&self) -> impl Iterator<Item = (Key, &T)> {
        let slots = (0..).zip(self.blocks.iter().flatten());
        slots.filter_map(|(place, slot)| slot.value.as_ref().map(|value| (Key { place, generation: slot.generation }, value)))
    }

    fn grow(&mut self) -> Option<u32> {
        let blocks = self.blocks.len();
        let last = self.blocks.last().map_or(BLOCK, Vec::len);
        if last == BLOCK {
            self.blocks.push(Vec::with_capacity(BLOCK));
        }
        let (block, at) = if last == BLOCK { (blocks, 0) } else { (blocks.checked_sub(1)?, last) };
        let place = u32::try_from(block.checked_mul(BLOCK)?.checked_add(at)?).ok()?;
        let slot = Slot { generation: self.epoch, next: NONE, value: None };
        self.blocks.get_mut(block)?.push(slot);
        Some(place)
    }

    /// The entry of this key, if it is still there.
    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        self.slot_mut(key.place).filter(|slot| slot.generation == key.generation)?.value.as_mut()
    }

    /// The entry at a place.
    pub(crate) fn at(&self, place: u32) -> Option<&T> {
        let place = usize::try_from(place).ok()?;
        self.blocks.get(place / BLOCK)?.get(place % BLOCK)?.value.as_ref()
    }

    /// The entry at a place.
    pub(crate) fn at_mut(&mut self, place: u32) -> Option<&mut T> {
        self.slot_mut(place)?.value.as_mut()
    }

    /// The key of the entry at a place.
    pub(crate) fn key(&self, place: u32) -> Option<Key> {
        let at = usize::try_from(place).ok()?;
        let slot = self.blocks.get(at / BLOCK)?.get(at % BLOCK)?;
        slot.value.as_ref().map(|_| Key { place, generation: slot.generation })
    }

    /// Takes an entry out.
    pub(crate) fn remove(&mut self, key: Key) -> Option<T> {
        let free = self.free;
        let slot = self.slot_mut(key.place).filter(|slot| slot.generation == key.generation)?;
        let value = slot.value.take()?;
        slot.next = free;
        self.free = key.place;
        self.count = self.count.saturating_sub(1);
        Some(value)
    }

    /// Takes everything out. No number of it leads anywhere after that.
    pub(crate) fn clear(&mut self) {
        let keys: Vec<Key> = self.all().map(|(key, _)| key).collect();
        for key in keys {
            self.remove(key);
        }
    }

    fn slot_mut(&mut self, place: u32) -> Option<&mut Slot<T>> {
        let place = usize::try_from(place).ok()?;
        self.blocks.get_mut(place / BLOCK)?.get_mut(place % BLOCK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_not_used_twice() {
        let mut slots = Slots::new(u32::MAX - 2);
        let mut seen = Vec::new();
        for round in 0..8 {
            let key = slots.insert(round, 1).unwrap();
            assert!(!seen.contains(&key), "{key:?}");
            assert_ne!(key.generation, 0);
            assert_eq!(slots.insert(99, 1), None, "the table is full");
            assert_eq!(slots.remove(key), Some(round));
            assert_eq!(slots.get_mut(key), None);
            assert_eq!(slots.remove(key), None);
            seen.push(key);
        }
    }

    #[test]
    fn places_are_filled_again() {
        let mut slots = Slots::new(7);
        let keys: Vec<_> = (0..1000).map(|value| slots.insert(value, 2000).unwrap()).collect();
        for key in &keys {
            slots.remove(*key).unwrap();
        }
        let again: Vec<_> = (0..1000).map(|value| slots.insert(value, 2000).unwrap()).collect();
        assert_eq!(again.iter().map(|key| key.place).max(), Some(999));
        assert_eq!(slots.len(), 1000);
    }

    #[test]
    fn what_comes_from_elsewhere_keeps_its_number() {
        let mut slots = Slots::new(7);
        let (far, near) = (Key { place: 700, generation: 99 }, Key { place: 3, generation: 5 });
        assert_eq!(slots.restore(far, 1, 1000), Some(()));
        assert_eq!(slots.restore(near, 2, 1000), Some(()));
        assert_eq!(slots.restore(Key { generation: 6, ..near }, 3, 1000), None, "the place is taken");
        assert_eq!(slots.restore(Key { place: 1000, generation: 5 }, 3, 1000), None, "there is no such place");
        assert_eq!(slots.restore(Key { place: 9, generation: 0 }, 3, 1000), None, "nothing has that number");
        slots.settle();
        assert_eq!((slots.get_mut(far).copied(), slots.len()), (Some(1), 2));
        let others: Vec<_> = (0..998).map(|value| slots.insert(value, 1000).unwrap().place).collect();
        assert!(!others.contains(&700) && !others.contains(&3));
        assert_eq!((others.iter().max(), slots.insert(0, 1000)), (Some(&999), None));
    }
}
