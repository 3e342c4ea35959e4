//! Settings with a fixed set of words as values.

use std::fmt;

use super::collections::is_nsid;
use super::read::Wrong;

/// An enumeration whose values are words; the first spelling of each is the one printed.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident {
        $($(#[$variant_doc:meta])* $variant:ident = $word:literal $(| $other:literal)*,)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
        }

        impl $name {
            /// The word that stands for it in the environment.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                }
            }

            /// Parses the word; case does not matter.
            pub(super) fn from_word(text: &str) -> Result<Self, Wrong> {
                $(if [$word $(, $other)*].iter().any(|word| text.eq_ignore_ascii_case(word)) {
                    return Ok(Self::$variant);
                })*
                let words = [$($word),*].join(", ");
                Err(Wrong::new("is not a known value", format!("write one of {words}")))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

words! {
    /// `LOG_LEVEL`.
    LogLevel {
        /// Everything that helps with debugging.
        Debug = "DEBUG",
        /// Normal operation.
        Info = "INFO",
        /// Worth an operator's attention.
        Warning = "WARNING" | "WARN",
        /// Operator action needed.
        Error = "ERROR",
    }
}

impl LogLevel {
    /// The level of this name, however it is spelled in `LOG_LEVEL`.
    #[must_use]
    pub fn named(text: &str) -> Option<Self> {
        Self::from_word(text).ok()
    }

    /// The level's name in a tracing filter.
    #[must_use]
    pub fn as_filter(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warning => "warn",
            Self::Error => "error",
        }
    }
}

words! {
    /// `LOG_FORMAT`.
    LogFormat {
        /// One readable line per message.
        Text = "text",
        /// One JSON object per message.
        Json = "json",
    }
}

words! {
    /// `ON_FUTURE_CURSOR`: what the reader does when the relay reports that the stored cursor is in its future.
    OnFutureCursor {
        /// Stop and report it: an operator decides about the gap.
        Stop = "stop",
        /// Resume from the relay's live position.
        Live = "live",
        /// Resume with the oldest event that the relay still has.
        Oldest = "oldest",
    }
}

words! {
    /// TRANSACTION: how many events share a transaction.
    TransactionMode {
        /// Each event has its own.
        Event = "event",
        /// A batch shares one, or a few; events that fail together are applied one by one.
        Batch = "batch",
    }
}

/// `BACKFILL`: the accounts whose whole repositories are fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backfill {
    /// Those that the tables name.
    Seen,
    /// Those that the relay lists.
    All,
    /// Those that the relay lists as having records in a collection.
    Collection(String),
}

impl Backfill {
    pub(super) fn parse(text: &str) -> Result<Self, Wrong> {
        match text.strip_prefix("collection:") {
            Some(nsid) if is_nsid(nsid) => Ok(Self::Collection(nsid.to_owned())),
            None if text.eq_ignore_ascii_case("seen") => Ok(Self::Seen),
            None if text.eq_ignore_ascii_case("all") => Ok(Self::All),
            _ => Err(Wrong::new(
                "is not a known value",
                "write seen, all, or collection: with a name such as collection:app.bsky.feed.post",
            )),
        }
    }
}

impl fmt::Display for Backfill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Seen => f.write_str("seen"),
            Self::All => f.write_str("all"),
            Self::Collection(nsid) => write!(f, "collection:{nsid}"),
        }
    }
}

words! {
    /// `VERIFY`.
    VerifyMode {
        /// Nothing is verified.
        Off = "off",
        /// Everything is verified and counted; nothing is withheld.
        Log = "log",
        /// What is invalid is withheld.
        On = "on",
    }
}
