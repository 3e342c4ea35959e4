//! What of a DID document matters here: the account's key, its server and its handle
//! (<https://atproto.com/specs/did#did-documents>).

use serde::Deserialize;

use super::Key;

/// The longest address of a server that is kept.
const MAX_SERVER: usize = 512;
/// The longest handle (<https://atproto.com/specs/handle>).
const MAX_HANDLE: usize = 253;

/// The parts of a DID document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The signing key; `None` if it names none that can be used.
    pub key: Option<Key>,
    /// The account's server; `None` if it names none.
    pub server: Option<String>,
    /// The handle that it claims. Only the handle's own answer confirms it.
    pub handle: Option<String>,
}

/// Why a document is unusable.
#[derive(Debug, thiserror::Error)]
pub enum BadDocument {
    /// Not the JSON that it should be.
    #[error("the DID document is not readable: {0}")]
    Json(#[from] serde_json::Error),
    /// Another account's.
    #[error("the DID document is that of another account")]
    Other,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw<'a> {
    id: String,
    #[serde(default)]
    also_known_as: Vec<String>,
    #[serde(default, borrow)]
    verification_method: Vec<Method<'a>>,
    #[serde(default)]
    service: Vec<Service>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Method<'a> {
    id: String,
    #[serde(rename = "type", borrow)]
    kind: std::borrow::Cow<'a, str>,
    #[serde(default)]
    public_key_multibase: String,
}

#[derive(Deserialize)]
struct Service {
    id: String,
    #[serde(rename = "type")]
    kind: serde_json::Value,
    #[serde(rename = "serviceEndpoint")]
    endpoint: serde_json::Value,
}

impl Document {
    /// Reads the document of `did`. The first method and the first service of their names count.
    ///
    /// # Errors
    ///
    /// It is not a DID document, or that of another account.
    pub fn read(did: &str, json: &[u8]) -> Result<Self, BadDocument> {
        let raw: Raw<'_> = serde_json::from_slice(json)?;
        if raw.id != did {
            return Err(BadDocument::Other);
        }
        let named = |id: &str, name: &str| id.strip_prefix(did).unwrap_or(id) == name;
        let method = raw.verification_method.iter().find(|method| named(&method.id, "#atproto"));
        let service = raw.service.iter().find(|service| {
            named(&service.id, "#atproto_pds") && service.kind == "AtprotoPersonalDataServer"
        });
        let handle = raw.also_known_as.iter().find_map(|name| name.strip_prefix("at://"));
        Ok(Self {
            key: method.and_then(|method| Key::from_method(&method.kind, &method.public_key_multibase).ok()),
            server: service
                .and_then(|service| service.endpoint.as_str())
                .filter(|server| server.len() <= MAX_SERVER)
                .map(str::to_owned),
            handle: handle.filter(|handle| is_handle(handle)).map(str::to_owned),
        })
    }
}

/// Whether this is a handle (<https://atproto.com/specs/handle>): a domain name whose last part begins with a letter.
#[must_use]
pub fn is_handle(text: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= MAX_HANDLE
        && text.split('.').all(is_label)
        && text.rsplit_once('.').is_some_and(|(_, last)| last.starts_with(|c: char| c.is_ascii_alphabetic()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_official_vectors_for_handles_hold() {
        let lines = |vectors: &'static str| {
            vectors.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect::<Vec<_>>()
        };
        let valid = lines(include_str!("../../tests/fixtures/interop/syntax/handle_syntax_valid.txt"));
        let invalid = lines(include_str!("../../tests/fixtures/interop/syntax/handle_syntax_invalid.txt"));
        assert!(valid.len() > 20 && invalid.len() > 20);
        for handle in valid {
            assert!(is_handle(handle), "{handle}");
        }
        for handle in invalid {
            assert!(!is_handle(handle), "{handle}");
        }
    }
}
