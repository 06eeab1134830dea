//! Death between any two writes: nothing is lost, nothing is done twice that the guest has back.

use proptest::prelude::*;

use super::*;
use crate::memory::tests::guest;

const SIZE: u16 = 8;

fn region() -> Arc<Memory> {
    Arc::new(guest(&[(0, 4096)]))
}

/// One write of the dead process.
#[derive(Clone, Copy, Debug)]
enum Step {
    Take,
    Join(u16),
    PublishRing,
    PublishLog,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// A model device takes and gives back in any order and is stopped after any step. What recovery says is in flight has to be
    /// what was taken and is not visible in the used ring, in the order it was taken.
    #[test]
    fn recovery_finds_what_was_in_flight(script in prop::collection::vec(any::<u8>(), 0..60), start in any::<u16>()) {
        let region = region();
        let mut log = Log::new(Arc::clone(&region), 0, SIZE, SIZE).unwrap();
        prop_assert_eq!(log.recover(start).unwrap(), Vec::<u16>::new());
        let (mut used, mut taken, mut batch, mut shown) = (start, Vec::new(), Vec::new(), Vec::new());
        for byte in script {
            // The writes of `publish` come in this order and are not interleaved with others.
            let step = match byte % 4 {
                _ if !shown.is_empty() => Step::PublishLog,
                0 | 1 if taken.len() + batch.len() < usize::from(SIZE) => Step::Take,
                2 if !taken.is_empty() => Step::Join(u16::from(byte / 4) % u16::try_from(taken.len()).unwrap()),
                3 if !batch.is_empty() => Step::PublishRing,
                _ => continue,
            };
            match step {
                Step::Take => {
                    let head = (0..SIZE).find(|head| !taken.contains(head) && !batch.contains(head)).unwrap();
                    log.take(head);
                    taken.push(head);
                }
                Step::Join(which) => {
                    let head = taken.remove(usize::from(which));
                    log.join_batch(head);
                    batch.push(head);
                }
                Step::PublishRing => {
                    used = used.wrapping_add(u16::try_from(batch.len()).unwrap());
                    shown = std::mem::take(&mut batch);
                }
                Step::PublishLog => {
                    log.batch_published(&shown, used);
                    shown.clear();
                }
            }
        }
        let mut expected: Vec<u16> = taken.clone();
        expected.extend(&batch);
        expected.sort_by_key(|head| region.load_u64(log.span, entry(*head) + COUNTER_AT, Ordering::Relaxed));
        let mut successor = Log::new(Arc::clone(&region), 0, SIZE, SIZE).unwrap();
        prop_assert_eq!(&successor.recover(used).unwrap(), &expected);
        // Death during or after recovery: the next one finds the same.
        let mut third = Log::new(Arc::clone(&region), 0, SIZE, SIZE).unwrap();
        prop_assert_eq!(&third.recover(used).unwrap(), &expected);
        // New requests are younger than the old ones.
        if let Some(free) = (0..SIZE).find(|head| !expected.contains(head)) {
            third.take(free);
            expected.push(free);
            prop_assert_eq!(&Log::new(region, 0, SIZE, SIZE).unwrap().recover(used).unwrap(), &expected);
        }
    }

    /// The region may hold anything: recovery ends, and names only heads that exist, each once.
    #[test]
    fn any_content_is_survived(bytes in prop::collection::vec(any::<u8>(), 192), used in any::<u16>(), sane in any::<bool>()) {
        let region = region();
        region.store(region.span(0, 192).unwrap(), 0, &bytes);
        if sane {
            region.store_u16(region.span(0, 192).unwrap(), VERSION_AT, VERSION, Ordering::Relaxed);
            region.store_u16(region.span(0, 192).unwrap(), ENTRIES_AT, SIZE, Ordering::Relaxed);
            region.store_u16(region.span(0, 192).unwrap(), USED_AT, used.wrapping_sub(3), Ordering::Relaxed);
        }
        if let Ok(mut heads) = Log::new(Arc::clone(&region), 0, SIZE, SIZE).unwrap().recover(used) {
            prop_assert!(heads.iter().all(|head| *head < SIZE));
            heads.sort_unstable();
            heads.dedup();
            prop_assert!(heads.len() <= usize::from(SIZE));
        }
    }
}

#[test]
fn a_log_for_another_ring_is_refused() {
    let region = region();
    Log::new(Arc::clone(&region), 0, SIZE, 4).unwrap().recover(0).unwrap();
    assert!(matches!(Log::new(Arc::clone(&region), 0, SIZE, SIZE).unwrap().recover(0), Err(Error::Size(4, SIZE))));
    assert!(matches!(Log::new(Arc::clone(&region), 200, SIZE, SIZE), Err(Error::TooSmall)));
    region.store_u16(region.span(0, 16).unwrap(), VERSION_AT, 7, Ordering::Relaxed);
    assert!(matches!(Log::new(region, 0, SIZE, 4).unwrap().recover(0), Err(Error::Version(7))));
}
