//! Pseudo-random numbers from a seed, which is printed when a test fails. The
//! same seed leads to the same choices again.

use std::str::FromStr;
use std::thread::panicking;
use std::time::{SystemTime, UNIX_EPOCH};

/// A number from the environment, or the usual one.
pub fn setting<T: FromStr>(variable: &str, usual: T) -> T {
    let Ok(text) = std::env::var(variable) else {
        return usual;
    };
    text.parse()
        .unwrap_or_else(|_| panic!("{variable} is {text:?}, it has to be a number"))
}

/// The source of a test's choices: the present time, or the environment
/// variable of that name. A failing test prints it.
pub struct Seed {
    variable: &'static str,
    value: u64,
}

impl Seed {
    pub fn of(variable: &'static str) -> Seed {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let value = setting(variable, u64::from(now.subsec_nanos()));
        Seed { variable, value }
    }

    /// The numbers for one thread, or another part, of a test.
    pub fn random(&self, part: u64) -> Random {
        Random::new(self.value.wrapping_add(part << 32))
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        if panicking() {
            eprintln!(
                "--- to repeat its choices: {}={}",
                self.variable, self.value
            );
        }
    }
}

/// Marsaglia's xorshift, with 64 bits.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        // Similar seeds lead to different numbers. 0 would only lead to 0.
        Random(seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.number() % limit
    }

    pub fn is_one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// A random index into something of that length.
    pub fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length as u64)).unwrap()
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.index(from.len())]
    }
}
