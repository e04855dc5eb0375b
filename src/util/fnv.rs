//! FNV-1a with 64 bits (RFC 9923), to see whether bytes have changed. This checksum does
//! not protect against a program that forges bytes on purpose.

const OFFSET_BASIS: u64 = 0xCBF2_9CE4_8422_2325;
const PRIME: u64 = 0x0000_0100_0000_01B3;

/// A checksum over all bytes added so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fnv(u64);

impl Fnv {
    /// The checksum of no bytes.
    pub fn new() -> Fnv {
        Fnv(OFFSET_BASIS)
    }

    /// Adds bytes to the checksum.
    pub fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(PRIME);
        }
    }

    /// The checksum of all bytes added so far.
    pub fn sum(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_the_specification() {
        let sum = |text: &str| {
            let mut fnv = Fnv::new();
            fnv.add(text.as_bytes());
            fnv.sum()
        };
        assert_eq!(sum(""), 0xCBF2_9CE4_8422_2325);
        assert_eq!(sum("a"), 0xAF63_DC4C_8601_EC8C);
        assert_eq!(sum("foobar"), 0x8594_4171_F739_67E8);
    }
}
