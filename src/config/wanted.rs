//! Which accounts the reader keeps.

use std::collections::HashSet;
use std::fmt;

use super::read::{Wrong, shown};
use crate::event::is_did;

/// `WANTED_DIDS`, if it is set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WantedDids {
    /// These.
    List(HashSet<String>),
    /// Those in `standpipe.repos`.
    Tracked,
}

impl WantedDids {
    pub(super) fn parse(text: &str) -> Result<Self, Wrong> {
        let right = "write DIDs such as did:plc:ewvi7nxzyoun6zhxrhs64oiz, separated by commas, or tracked";
        if text.eq_ignore_ascii_case("tracked") {
            return Ok(Self::Tracked);
        }
        let mut list = HashSet::new();
        for did in text.split(',').map(str::trim).filter(|did| !did.is_empty()) {
            if !is_did(did) {
                return Err(Wrong::new(format!("has {}, which is not a DID", shown(did)), right));
            }
            list.insert(did.to_owned());
        }
        if list.is_empty() { Err(Wrong::new("names no account", right)) } else { Ok(Self::List(list)) }
    }
}

impl fmt::Display for WantedDids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tracked => f.write_str("tracked"),
            Self::List(list) => {
                let mut sorted: Vec<&str> = list.iter().map(String::as_str).collect();
                sorted.sort_unstable();
                f.write_str(&sorted.join(","))
            }
        }
    }
}
