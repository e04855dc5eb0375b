//! The format of all labels of a snapshot in one column, so that reading a thousand
//! snapshots does not take a query for each. Labels are in the order of their keys. Each
//! label is the key's length in bytes as a 32-bit little-endian number, the key, and
//! then the value in the same format.

use crate::types::Labels;

/// Encodes labels as bytes.
pub fn encode(labels: &Labels) -> Vec<u8> {
    let mut bytes = Vec::new();
    for text in labels.iter().flat_map(|(key, value)| [key, value]) {
        let length = u32::try_from(text.len()).expect("a label has at most 4096 bytes");
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(text.as_bytes());
    }
    bytes
}

/// Decodes labels; `None` for bytes that [`encode`] does not produce.
pub fn decode(mut bytes: &[u8]) -> Option<Labels> {
    let mut labels = Labels::new();
    while !bytes.is_empty() {
        let key = take_text(&mut bytes)?;
        let value = take_text(&mut bytes)?;
        labels.insert(key, value);
    }
    Some(labels)
}

fn take_text(bytes: &mut &[u8]) -> Option<String> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    let (text, rest) = rest.split_at_checked(length)?;
    *bytes = rest;
    String::from_utf8(text.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_come_back_as_they_were() {
        let labels: Labels = [("a", "1"), ("b.c/d", "é\n\0"), ("empty", "")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
        assert_eq!(decode(&encode(&labels)), Some(labels));
        assert_eq!(decode(&[]), Some(Labels::new()));
    }

    #[test]
    fn damaged_bytes_are_noticed() {
        let good = encode(&[("key".to_owned(), "value".to_owned())].into());
        for end in 1..good.len() {
            assert_eq!(decode(&good[..end]), None, "cut to {end} bytes");
        }
        assert_eq!(decode(&[1, 0, 0, 0, 0xff, 0, 0, 0, 0]), None, "not UTF-8");
        assert_eq!(decode(&[0xff; 8]), None, "a length past the end");
    }
}
