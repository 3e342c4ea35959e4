//! The syntax of DIDs (<https://atproto.com/specs/did>).

/// The most characters that fit into the tables. The protocol allows longer ones; nobody has one.
pub const MAX_DID: usize = 255;

/// Whether a text is a DID.
#[must_use]
pub fn is_did(text: &str) -> bool {
    text.len() <= MAX_DID
        && text.strip_prefix("did:").and_then(|rest| rest.split_once(':')).is_some_and(|(method, id)| {
            !method.is_empty()
                && method.bytes().all(|c| c.is_ascii_lowercase())
                && !id.is_empty()
                && !id.ends_with([':', '%'])
                && id.bytes().all(|c| c.is_ascii_alphanumeric() || b"._:%-".contains(&c))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_official_vectors_hold() {
        let lines =
            |text: &'static str| text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        // Longer ones are valid, and do not fit into the tables.
        for did in lines(include_str!("../../tests/fixtures/interop/syntax/did_syntax_valid.txt")) {
            assert_eq!(is_did(did), did.len() <= MAX_DID, "{did}");
        }
        for did in lines(include_str!("../../tests/fixtures/interop/syntax/did_syntax_invalid.txt")) {
            assert!(!is_did(did), "{did}");
        }
    }
}
