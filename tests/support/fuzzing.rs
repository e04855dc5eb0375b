//! Shared by tests with random input: how long they run, and how they damage
//! valid input.

use std::time::{Duration, Instant};

use super::random::{Random, setting};

/// Numbers of cases: as many as there is time for (`FUZZ_SECONDS`), but at
/// least `least`.
pub fn cases(least: u64) -> impl Iterator<Item = u64> {
    let end = Instant::now() + Duration::from_secs(setting("FUZZ_SECONDS", 5));
    (0..).take_while(move |done| *done < least || Instant::now() < end)
}

/// Changes a sequence in a few places: parts of it are removed, doubled or
/// moved, and values of `any` are inserted.
pub fn spoil<T: Clone>(
    items: &mut Vec<T>,
    random: &mut Random,
    mut any: impl FnMut(&mut Random) -> T,
) {
    for _ in 0..=random.below(3) {
        let from = random.index(items.len() + 1);
        let to = from + random.index(items.len() - from + 1);
        match random.below(5) {
            0 => items.truncate(from),
            1 => items.insert(from, any(random)),
            2 => drop(items.drain(from..to)),
            3 => {
                let part = items[from..to].to_vec();
                let at = random.index(items.len() + 1);
                items.splice(at..at, part);
            }
            _ => {
                if let Some(item) = items.get_mut(from) {
                    *item = any(random);
                }
            }
        }
    }
}
