//! Paths in URIs (RFC 3986). Pure.

/// Encodes a path for a URI: bytes that could have a special meaning in a URI become
/// `%` and two hexadecimal digits.
pub fn encode_path(path: &[u8]) -> String {
    let mut uri = String::with_capacity(path.len());
    for byte in path {
        match byte {
            b'/' | b'-' | b'.' | b'_' | b'~' => uri.push(char::from(*byte)),
            _ if byte.is_ascii_alphanumeric() => uri.push(char::from(*byte)),
            _ => uri.push_str(&format!("%{byte:02X}")),
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_as_uris() {
        assert_eq!(encode_path(b"/run/a-b_c.sock"), "/run/a-b_c.sock");
        assert_eq!(encode_path("/a b%é?#".as_bytes()), "/a%20b%25%C3%A9%3F%23");
    }
}
