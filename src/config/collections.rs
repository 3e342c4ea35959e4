//! Which collections the reader keeps.

use std::fmt;

use super::read::{Wrong, shown};

/// Which collections the reader keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collections(Vec<Wanted>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    All,
    /// With its trailing dot: `app.bsky.`.
    Under(String),
    Exactly(String),
}

impl Collections {
    /// Whether events of this collection are wanted. Names are compared exactly; `app.bsky.*` keeps
    /// everything below `app.bsky`, at any depth.
    #[must_use]
    pub fn keeps(&self, collection: &str) -> bool {
        self.0.iter().any(|wanted| match wanted {
            Wanted::All => true,
            Wanted::Under(prefix) => collection.starts_with(prefix.as_str()),
            Wanted::Exactly(name) => collection == name,
        })
    }

    /// The collections as patterns such as `app.bsky.*`; `None` if all are kept.
    #[must_use]
    pub fn patterns(&self) -> Option<Vec<String>> {
        let pattern = |wanted: &Wanted| match wanted {
            Wanted::All => None,
            Wanted::Under(prefix) => Some(format!("{prefix}*")),
            Wanted::Exactly(name) => Some(name.clone()),
        };
        self.0.iter().map(pattern).collect()
    }

    pub(super) fn parse(text: &str) -> Result<Self, Wrong> {
        let right = "write names such as app.bsky.feed.post, app.bsky.* or *, separated by commas";
        let mut wanted = Vec::new();
        for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            wanted.push(match name.strip_suffix(".*") {
                _ if name == "*" => Wanted::All,
                Some(prefix) if prefix.split('.').all(is_domain_segment) => {
                    Wanted::Under(format!("{prefix}."))
                }
                None if is_nsid(name) => Wanted::Exactly(name.to_owned()),
                _ => {
                    return Err(Wrong::new(format!("has {}, which is not a collection", shown(name)), right));
                }
            });
        }
        if wanted.is_empty() {
            return Err(Wrong::new("names no collection", right));
        }
        Ok(Self(wanted))
    }
}

impl fmt::Display for Collections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, wanted) in self.0.iter().enumerate() {
            let comma = if number > 0 { "," } else { "" };
            match wanted {
                Wanted::All => write!(f, "{comma}*")?,
                Wanted::Under(prefix) => write!(f, "{comma}{prefix}*")?,
                Wanted::Exactly(name) => write!(f, "{comma}{name}")?,
            }
        }
        Ok(())
    }
}

/// The NSID syntax of the AT Protocol: at least two domain segments, then a name of letters and digits.
pub(super) fn is_nsid(text: &str) -> bool {
    let segments: Vec<_> = text.split('.').collect();
    let Some((name, domain)) = segments.split_last() else {
        return false;
    };
    text.len() <= 317
        && domain.len() >= 2
        && domain.iter().all(|segment| is_domain_segment(segment))
        && name.len() <= 63
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|b| b.is_ascii_alphanumeric())
}

fn is_domain_segment(segment: &str) -> bool {
    (1..=63).contains(&segment.len())
        && segment.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !segment.starts_with('-')
        && !segment.ends_with('-')
}
