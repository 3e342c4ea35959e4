//! What a subscriber asks for, in the query of its URL.

use serde::Deserialize;

use crate::output::events;
use crate::output::filter::{Filter, Options};

/// The format of the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    /// `/subscribe`.
    One,
    /// `/xrpc/network.bsky.jetstream.subscribeEvents`.
    Two,
}

/// What the URL asks for.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) cursor: Option<u64>,
    pub(super) require_hello: bool,
    pub(super) compress: bool,
    pub(super) token: Option<String>,
    options: Options,
    kinds: Vec<&'static str>,
}

impl Asked {
    /// Reads a query.
    ///
    /// # Errors
    ///
    /// What is wrong with it, in words.
    pub(super) fn read(version: Version, query: &str) -> Result<Self, String> {
        let mut asked = Self {
            cursor: None,
            require_hello: false,
            compress: false,
            token: None,
            options: Options::default(),
            kinds: Vec::new(),
        };
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            let number = || value.parse::<i64>().map_err(|_| format!("{name}: {value:.50} is not a number"));
            match (version, &*name) {
                (Version::One, "wantedCollections") | (Version::Two, "collections") => {
                    asked.options.wanted_collections.push(value.into_owned());
                }
                (Version::One, "wantedDids") | (Version::Two, "dids") => {
                    asked.options.wanted_dids.push(value.into_owned());
                }
                (Version::Two, "kinds") => asked.kinds.push(kind(&value)?),
                (Version::Two, "maxMessageSizeBytes") if u32::try_from(number()?).is_err() => {
                    return Err(format!("{name}: {value:.50} is not between 0 and 4294967295"));
                }
                (_, "maxMessageSizeBytes") => asked.options.max_message_size_bytes = number()?,
                // Before there was anything is the beginning.
                (_, "cursor") => asked.cursor = Some(u64::try_from(number()?).unwrap_or(0)),
                (Version::One, "requireHello") => asked.require_hello = value == "true",
                (Version::One, "compress") => asked.compress = value == "true",
                (_, "token") => asked.token = Some(value.into_owned()),
                (Version::Two, "wantedCollections" | "wantedDids" | "requireHello" | "compress") => {
                    return Err(format!("{name} belongs to /subscribe; see {}", events::NAME));
                }
                (Version::Two, "zstdDictionary") => {
                    return Err("zstdDictionary: this server does not compress".to_owned());
                }
                // As in a Jetstream, what is unknown changes nothing.
                _ => {}
            }
        }
        Ok(asked)
    }

    /// The filter that it asks for.
    ///
    /// # Errors
    ///
    /// What is wrong with it, in words.
    pub(super) fn filter(&mut self) -> Result<Filter, String> {
        let (options, kinds) = (std::mem::take(&mut self.options), std::mem::take(&mut self.kinds));
        if !options.wanted_collections.is_empty() && !kinds.is_empty() && !kinds.contains(&"commit") {
            return Err("collections: only commits have one, and `kinds` leaves them out".to_owned());
        }
        Ok(Filter::new(options)?.of_kinds(kinds))
    }
}

fn kind(value: &str) -> Result<&'static str, String> {
    const KINDS: [&str; 4] = ["commit", "identity", "account", "sync"];
    let known = KINDS.into_iter().find(|kind| *kind == value);
    known.ok_or_else(|| format!("kinds: {value:.50} is none of {}", KINDS.join(", ")))
}

/// A message from a subscriber.
#[derive(Deserialize)]
pub(super) struct FromSubscriber {
    pub(super) r#type: String,
    #[serde(default)]
    pub(super) payload: Options,
}
