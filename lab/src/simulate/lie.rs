//! What a relay can get wrong about a commit, as far as it is told to.

use std::collections::{HashMap, HashSet};

use super::NetworkOptions;
use super::accounts::mix;
use super::frame::{Commit, Planned, What, block};
use super::key::Key;
use super::network::Network;
use super::repository::{Change, commit_object, signed_commit};

/// A way to get a commit wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lie {
    /// It is not sent at all.
    Dropped,
    /// A bit of the signature is another.
    Signature,
    /// Somebody else signed it.
    Signer,
    /// An operation is left out.
    Omitted,
    /// An operation is made up.
    Invented,
    /// A record says something else.
    Changed,
    /// A bit of a block is another than its CID says.
    Bit,
    /// A node of the tree is missing.
    Node,
    /// It names another tree before it.
    PrevData,
    /// It names another revision before it: what it does is true all the same.
    Since,
}

impl Lie {
    /// All of them; what is dropped is as frequent as all others together.
    const ALL: [Lie; 9] = [
        Lie::Signature,
        Lie::Signer,
        Lie::Omitted,
        Lie::Invented,
        Lie::Changed,
        Lie::Bit,
        Lie::Node,
        Lie::PrevData,
        Lie::Since,
    ];

    /// Gets it wrong.
    pub(super) fn tell(self, commit: &mut Commit<'_>) {
        let data = commit.proof.nodes.first().map(|(_, cid)| *cid);
        match self {
            Lie::Dropped => {}
            Lie::Signature => {
                // The text "sig", a header of two bytes, and the signature.
                let mut bytes = commit.proof.commit.0.clone();
                if let Some(at) = bytes.windows(4).position(|part| part == b"csig") {
                    bytes[at + 10] ^= 1;
                }
                commit.proof.commit = block(|out| {
                    out.extend_from_slice(&bytes);
                    Ok(())
                });
            }
            Lie::Signer => {
                if let Some(data) = data {
                    let key = Key::of(0, 0, 0);
                    commit.proof.commit = signed_commit(&commit.did, &commit.rev, &data, &key);
                }
            }
            Lie::Omitted => _ = commit.changes.pop(),
            Lie::Invented => commit.changes.push(Change {
                path: "app.bsky.feed.post/2222222222222".to_owned(),
                record: None,
                prev: data,
            }),
            Lie::Changed => match commit.changes.last_mut() {
                Some(change) if change.record.is_some() => change.record = Some(other_record()),
                Some(change) => change.prev = data,
                None => {}
            },
            Lie::Bit => {
                if let Some((bytes, _)) = commit.proof.nodes.last_mut()
                    && let Some(byte) = bytes.last_mut()
                {
                    *byte ^= 1;
                }
            }
            Lie::Node => commit.proof.nodes.clear(),
            Lie::PrevData => commit.proof.prev_data = Some(other_record().1),
            Lie::Since => commit.since = commit.since.saturating_sub(1024).max(1024),
        }
    }
}

/// A record that nobody has.
fn other_record() -> (Vec<u8>, shrike::cbor::Cid) {
    // It has the form of a repository's root, which is as good as any.
    block(|out| {
        let nothing = shrike::cbor::Cid::compute(shrike::cbor::Codec::Drisl, &[]);
        commit_object(out, "did:plc:nobody", "2222222222222", &nothing, None)
    })
}

/// About which commits the relay lies. Of each account's commits, the last one is always told right, or nothing would ever
/// show that something was wrong; and accounts that are not active in the end are left alone, since their servers show
/// nothing any more.
pub(super) struct Lies {
    one_in: u32,
    drops: u32,
    seed: u64,
    /// Each account's last commit, if it stays active; none known of an endless network.
    last: Option<HashMap<u32, u64>>,
}

impl Lies {
    pub(super) fn new(options: &NetworkOptions) -> Option<Self> {
        (options.lies > 0 || options.drops > 0).then(|| Self {
            one_in: options.lies,
            drops: options.drops,
            seed: options.seed,
            last: (options.events > 0).then(|| last_commits(options)),
        })
    }

    /// What is wrong with this frame.
    pub(super) fn about(&self, planned: &Planned) -> Option<Lie> {
        let What::Commit { account, since, .. } = planned.what else { return None };
        if let Some(last) = &self.last
            && last.get(&account).is_none_or(|last| planned.seq >= *last)
        {
            return None;
        }
        let chance = mix(mix(self.seed) ^ planned.seq);
        // Nobody who sees the second commit of an account for the first time knows how much there was before.
        if self.drops > 0 && since > 0 && (chance >> 16).is_multiple_of(self.drops.into()) {
            return Some(Lie::Dropped);
        }
        if self.one_in == 0 || !chance.is_multiple_of(self.one_in.into()) {
            return None;
        }
        let kind = usize::try_from((chance >> 32) % (2 * Lie::ALL.len() as u64)).unwrap_or(0);
        match Lie::ALL.get(kind) {
            Some(lie) => Some(*lie),
            None if since == 0 => Some(Lie::Signature),
            None => Some(Lie::Dropped),
        }
    }
}

fn last_commits(options: &NetworkOptions) -> HashMap<u32, u64> {
    let mut last = HashMap::new();
    let mut inactive = HashSet::new();
    let mut network = Network::unwritten(options);
    while let Some(Planned { seq, what, .. }) = network.step() {
        match what {
            What::Commit { account, .. } => _ = last.insert(account, seq),
            What::Account { account, active: true, .. } => _ = inactive.remove(&account),
            What::Account { account, .. } => _ = inactive.insert(account),
            _ => {}
        }
    }
    last.retain(|account, _| !inactive.contains(account));
    last
}
