//! What a subscriber wants.

use std::collections::HashSet;

use serde::Deserialize;

use super::jetstream::Message;
use crate::event::is_did;

/// The most collections that a subscriber may name, as in a Jetstream.
pub const MAX_COLLECTIONS: usize = 100;
/// The most accounts that a subscriber may name, as in a Jetstream.
pub const MAX_DIDS: usize = 10_000;

/// What a subscriber wants. Empty means everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    collections: HashSet<String>,
    /// Beginnings of collections.
    prefixes: Vec<String>,
    dids: HashSet<String>,
    /// Kinds of messages.
    kinds: Vec<&'static str>,
    /// Larger messages are left out; 0 for none.
    max_bytes: usize,
}

/// The filter in an `options_update`, and in the URL.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Options {
    /// Collections, or beginnings of some with `.*` at the end.
    #[serde(deserialize_with = "null_is_none")]
    pub wanted_collections: Vec<String>,
    /// Accounts.
    #[serde(deserialize_with = "null_is_none")]
    pub wanted_dids: Vec<String>,
    /// Messages larger than this are not wanted; 0 and less for no limit.
    pub max_message_size_bytes: i64,
}

/// Clients in Go send an empty list as null.
fn null_is_none<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Filter {
    /// The filter of these options.
    ///
    /// # Errors
    ///
    /// What is wrong with them, in words.
    pub fn new(options: Options) -> Result<Self, String> {
        let Options { wanted_collections, wanted_dids, max_message_size_bytes } = options;
        if wanted_collections.len() > MAX_COLLECTIONS {
            return Err(format!("more than {MAX_COLLECTIONS} collections"));
        }
        if wanted_dids.len() > MAX_DIDS {
            return Err(format!("more than {MAX_DIDS} DIDs"));
        }
        let mut filter =
            Self { max_bytes: usize::try_from(max_message_size_bytes).unwrap_or(0), ..Self::default() };
        for collection in wanted_collections {
            let is_name = |name: &str| {
                let chars = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
                !name.is_empty() && name.len() <= 317 && name.chars().all(chars)
            };
            match collection.strip_suffix(".*") {
                Some(prefix) if is_name(prefix) => filter.prefixes.push(format!("{prefix}.")),
                None if is_name(&collection) => {
                    filter.collections.insert(collection);
                }
                _ => {
                    return Err(format!("{collection:.100} is not the name of a collection"));
                }
            }
        }
        for did in wanted_dids {
            if !is_did(&did) {
                return Err(format!("{did:.100} is not a DID"));
            }
            filter.dids.insert(did);
        }
        Ok(filter)
    }

    /// The same, but only messages of these kinds; of none, all.
    #[must_use]
    pub fn of_kinds(self, kinds: Vec<&'static str>) -> Self {
        Self { kinds, ..self }
    }

    /// Whether a message of this size is wanted.
    #[must_use]
    pub fn wants(&self, message: &Message, bytes: usize) -> bool {
        let collection = match &message.collection {
            Some(name) => {
                (self.collections.is_empty() && self.prefixes.is_empty())
                    || self.collections.contains(name)
                    || self.prefixes.iter().any(|prefix| name.starts_with(prefix))
            }
            None => true,
        };
        collection
            && (self.kinds.is_empty() || self.kinds.contains(&message.kind))
            && (self.dids.is_empty() || self.dids.contains(&message.did))
            && (self.max_bytes == 0 || bytes <= self.max_bytes)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn a_filter_passes_what_a_jetstream_would() {
        let message = |did: &str, collection: Option<&str>| Message {
            index: 0,
            kind: "commit",
            did: did.into(),
            collection: collection.map(str::to_owned),
            text: Bytes::from_static(b"0123456789"),
        };
        let like = message("did:plc:a", Some("app.bsky.feed.like"));
        let identity = message("did:plc:a", None);
        let filter = |collections: &[&str], dids: &[&str], max| {
            let owned = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
            Filter::new(Options {
                wanted_collections: owned(collections),
                wanted_dids: owned(dids),
                max_message_size_bytes: max,
            })
        };
        for (wanted, collections, dids, max) in [
            (true, &[][..], &[][..], 0),
            (true, &["app.bsky.feed.*"], &[], -1),
            (true, &["app.bsky.feed.like"], &["did:plc:a"], 10),
            (false, &["app.bsky.fee.*"], &[], 0),
            (false, &["app.bsky.feed.post"], &[], 0),
            (false, &[], &["did:plc:b"], 0),
            (false, &[], &[], 9),
        ] {
            assert_eq!(
                filter(collections, dids, max).unwrap().wants(&like, 10),
                wanted,
                "{collections:?} {dids:?} {max}"
            );
        }
        assert!(
            filter(&["app.bsky.feed.post"], &[], 0).unwrap().wants(&identity, 10),
            "they are always sent"
        );
        assert!(
            !filter(&[], &["did:plc:b"], 0).unwrap().wants(&identity, 10),
            "but not about other accounts"
        );
        for (collections, dids) in
            [(vec!["app bsky"], vec![]), (vec!["*"], vec![]), (vec![], vec!["someone"])]
        {
            assert!(filter(&collections, &dids, 0).is_err(), "{collections:?} {dids:?}");
        }
        assert!(filter(&vec!["a.b"; 101], &[], 0).is_err());
        let of_go: Options =
            serde_json::from_str(r#"{"wantedCollections":null,"wantedDids":["did:plc:a"]}"#).unwrap();
        assert_eq!(of_go, Options { wanted_dids: vec!["did:plc:a".to_owned()], ..Options::default() });
    }
}
