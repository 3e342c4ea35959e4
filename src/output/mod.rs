//! What has been applied, for others to read: in the order of the stream, and only once it is in the tables.
//!
//! - `feed`: the settled entries, read once for all subscribers
//! - `jetstream`: an entry as the messages of a Jetstream, and a subscriber's filter

pub mod feed;
pub mod jetstream;
