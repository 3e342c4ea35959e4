//! A simulated relay: a made-up network of accounts whose traffic looks like the real one's, or a recorded file,
//! served over a websocket like `com.atproto.sync.subscribeRepos`.
//!
//! Everything follows from [`NetworkOptions`]: the same options give the same bytes, on every connection and in every
//! run. A test can therefore rebuild independently what a consumer must have seen, and a consumer can resume at a
//! cursor although nothing is stored.
//!
//! - `network`: what happens, in which order; the state of the made-up network
//! - `accounts`: identifiers, handles and status of its accounts
//! - `posts`, `pool`: what there is to be liked, answered, deleted; bounded
//! - `record`: what is written in the records
//! - `frame`: how events become CBOR and CAR bytes
//! - `repository`, `key`: the accounts' trees and signatures, if the network signs
//! - `lie`: what the relay gets wrong on purpose
//! - `recording`: frames from a file instead
//! - `serve`: the relay
//! - `server`: the directory of accounts and their server, for those who verify

mod accounts;
mod chance;
mod frame;
mod key;
mod lie;
mod network;
mod pool;
mod posts;
mod record;
mod recording;
mod repository;
mod serve;
mod server;

pub use frame::Frame;
pub use lie::Lie;
pub use network::Network;
pub use recording::read_frames;
pub use serve::{Counters, RelayOptions, Source, serve};

/// What the simulated network does. Everything follows from these numbers: same options, same bytes.
#[expect(clippy::struct_excessive_bools, reason = "independent of each other, and named where they are set")]
#[derive(Clone, Debug)]
pub struct NetworkOptions {
    /// Where all chance comes from.
    pub seed: u64,
    /// How many accounts appear in the course of time; 0 counts as 1.
    pub accounts: u32,
    /// How many frames there are; 0 is endless. A run of fewer frames is the beginning of a longer one.
    pub events: u64,
    /// The time of the first event. Later ones follow about 1 ms apart.
    pub start: jiff::Timestamp,
    /// Filler bytes per commit, in CAR blocks of their own that no operation refers to. Real frames carry about 5,000
    /// bytes of tree nodes; at most 1,000,000 are used.
    pub pad: usize,
    /// Whether accounts go away now and then and come back, or their servers have trouble.
    pub departures: bool,
    /// Whether accounts are also deleted for good, rarely. Needs `departures`.
    pub deletions: bool,
    /// Whether all accounts are there from the beginning, each as busy as the others: hardly two events in a row are
    /// from the same one.
    pub spread: bool,
    /// Whether the clock jumps now and then, by up to six hours in either direction.
    pub clock_jumps: bool,
    /// Whether the accounts have keys, sign their commits, and prove what has changed.
    pub signed: bool,
    /// Whether accounts that sign change their keys now and then, and at every second change their server.
    pub new_keys: bool,
    /// One commit in so many is sent wrong, or not at all; 0 is none. Needs `signed`.
    pub lies: u32,
    /// One commit in so many is not sent; 0 is none. Needs `signed`.
    pub drops: u32,
    /// What of that is sent after all, behind the last event. Nothing of an endless network.
    pub late: Late,
}

/// Which commits arrive after everything else, with new numbers, because they were not sent in their place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Late {
    /// None.
    #[default]
    Nothing,
    /// Those that only create records.
    Creates,
    /// All of them.
    Everything,
}

/// The sequence numbers of a network's events, without what they say: far faster than its frames.
pub fn sequence_numbers(options: &NetworkOptions) -> impl Iterator<Item = u64> + use<> {
    let mut network = Network::unwritten(options);
    std::iter::from_fn(move || network.step()).map(|planned| planned.seq)
}

impl Default for NetworkOptions {
    fn default() -> Self {
        NetworkOptions {
            seed: 1,
            accounts: 10_000,
            events: 0,
            // 2026-01-01T00:00:00Z
            start: jiff::Timestamp::constant(1_767_225_600, 0),
            pad: 0,
            departures: true,
            deletions: false,
            spread: false,
            clock_jumps: false,
            signed: false,
            new_keys: true,
            lies: 0,
            drops: 0,
            late: Late::Nothing,
        }
    }
}

#[cfg(test)]
mod signed_tests;
#[cfg(test)]
mod tests;
