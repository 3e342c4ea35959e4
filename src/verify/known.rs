//! What is remembered about an account between its commits: its head, and its key. Kept in Redis, 25 or 64 bytes each:
//! small enough for Redis to store hundreds of them in one listpack.

use shrike::cbor::Cid;

use super::Key;
use crate::event::tid_bits;

/// The newest commit of an account that is in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Its revision, as a number. 0 stands for none.
    pub rev: u64,
    /// Half of the hash of its tree: enough to notice a tree that is not the expected one.
    pub data: [u8; 16],
}

impl Head {
    /// The head that a commit leaves. A revision that is not a TID counts as older than every other one.
    #[must_use]
    pub fn new(rev: &str, data: &Cid) -> Self {
        let mut half = [0; 16];
        half.copy_from_slice(data.hash().split_at(16).0);
        Self { rev: tid_bits(rev).unwrap_or_default(), data: half }
    }

    /// Whether a commit follows this one directly.
    #[must_use]
    pub fn is_followed_by(&self, since: Option<&str>, prev_data: Option<&Cid>) -> bool {
        since.zip(prev_data).is_some_and(|(since, prev)| *self == Self::new(since, prev))
    }
}

/// A key from a DID document, and when it was looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownKey {
    /// The bytes of its multikey.
    bytes: [u8; 35],
    /// In seconds since 1970; 0 when the account has said since then that its document has changed.
    pub looked_up: u32,
}

impl KnownKey {
    /// A key that was just looked up.
    #[must_use]
    pub fn new(key: &Key, now_ms: u64) -> Self {
        let mut bytes = [0; 35];
        // Two bytes for the curve and 33 for a compressed point.
        for (to, from) in bytes.iter_mut().zip(key.to_bytes()) {
            *to = from;
        }
        Self { bytes, looked_up: u32::try_from(now_ms / 1000).unwrap_or(u32::MAX) }
    }

    /// The same key, of a document that has changed since.
    #[must_use]
    pub fn outdated(self) -> Self {
        Self { looked_up: 0, ..self }
    }

    /// Whether the account has said that its document has changed.
    #[must_use]
    pub fn is_outdated(&self) -> bool {
        self.looked_up == 0
    }

    /// The key; `None` if these bytes are not one.
    #[must_use]
    pub fn key(&self) -> Option<Key> {
        Key::from_bytes(&self.bytes).ok()
    }
}

/// The gaps that there have been. Each begins a generation of heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Generation {
    /// Their number.
    pub current: u64,
    /// The last of them that may have taken with it what was in the stream already: a head says what was appended, not
    /// what was applied.
    pub lossy: u64,
}

impl Generation {
    /// After a gap.
    #[must_use]
    pub fn next(self, lossy: bool) -> Self {
        let current = self.current + 1;
        Self { current, lossy: if lossy { current } else { self.lossy } }
    }

    /// How many gaps came after a head. Of a head, only the last bits are kept.
    fn age(self, head: u8) -> u64 {
        u64::from((self.current as u8).wrapping_sub(head))
    }

    /// Whether what leads to a head may have been lost after it was appended.
    #[must_use]
    pub fn may_lack(self, head: u8) -> bool {
        self.age(head) > self.current.saturating_sub(self.lossy)
    }
}

/// All that is remembered about an account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// `None` before its first verified commit.
    pub head: Option<Head>,
    /// The generation of the head.
    pub generation: u8,
    /// `None` before it was looked up, and after the account said that its document has changed.
    pub key: Option<KnownKey>,
}

/// What a commit is to the head before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Not newer: the head stays.
    Repeat,
    /// The next one, or the first.
    Next,
    /// Newer, and something between the two is missing.
    Missing,
    /// Newer, and since the head there was a gap that is to blame for what may be missing.
    AfterGap,
}

impl Known {
    /// Makes a commit the head, unless it is a repeat. `continues` says whether it is the next one after a head.
    pub fn advance(&mut self, new: Head, now: Generation, continues: impl FnOnce(&Head) -> bool) -> Step {
        let step = match &self.head {
            Some(head) if new.rev <= head.rev => return Step::Repeat,
            Some(_) if now.may_lack(self.generation) => Step::AfterGap,
            Some(head) if continues(head) => Step::Next,
            Some(_) if now.age(self.generation) > 0 => Step::AfterGap,
            Some(_) => Step::Missing,
            None => Step::Next,
        };
        self.head = Some(new);
        self.generation = now.current as u8;
        step
    }

    /// As kept in Redis.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(64);
        let head = self.head.unwrap_or(Head { rev: 0, data: [0; 16] });
        bytes.extend_from_slice(&head.rev.to_be_bytes());
        bytes.extend_from_slice(&head.data);
        bytes.push(self.generation);
        if let Some(key) = &self.key {
            bytes.extend_from_slice(&key.bytes);
            bytes.extend_from_slice(&key.looked_up.to_be_bytes());
        }
        bytes
    }

    /// From Redis. Anything else than we wrote counts as nothing known.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let Some((rev, rest)) = bytes.split_first_chunk::<8>() else { return Self::default() };
        let Some((data, rest)) = rest.split_first_chunk::<16>() else { return Self::default() };
        let Some((generation, rest)) = rest.split_first() else { return Self::default() };
        let rev = u64::from_be_bytes(*rev);
        let head = (rev != 0).then_some(Head { rev, data: *data });
        let key = rest.split_first_chunk::<35>().and_then(|(bytes, rest)| {
            let looked_up = u32::from_be_bytes(rest.try_into().ok()?);
            Some(KnownKey { bytes: *bytes, looked_up })
        });
        Self { head, generation: *generation, key }
    }
}

/// The bytes under which an account is kept in Redis: those that a `did:plc` encodes, else the DID itself.
#[must_use]
pub fn field(did: &str) -> Vec<u8> {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let packed = did.strip_prefix("did:plc:").filter(|id| id.len() == 24).and_then(|id| {
        let mut packed = Vec::with_capacity(15);
        for chars in id.as_bytes().chunks(8) {
            let mut bits = 0_u64;
            for c in chars {
                bits = bits << 5 | ALPHABET.iter().position(|letter| letter == c)? as u64;
            }
            packed.extend(bits.to_be_bytes().into_iter().skip(3));
        }
        Some(packed)
    });
    packed.unwrap_or_else(|| did.as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use shrike::cbor::Codec;

    use super::*;

    #[test]
    fn what_is_known_survives_redis() {
        let key = Key::from_did_key("did:key:zQ3shqwJEJyMBsBXCWyCBpUBMqxcon9oHB7mCvx4sSpMdLJwc").unwrap();
        let head = Head::new("3jzfcijpj2z2a", &Cid::compute(Codec::Drisl, b"tree"));
        let known_key = KnownKey::new(&key, 1_700_000_000_123);
        assert_eq!(known_key.key(), Some(key));
        for known in [
            Known::default(),
            Known { head: Some(head), generation: 255, key: None },
            Known { head: None, generation: 0, key: Some(known_key) },
            Known { head: Some(head), generation: 1, key: Some(known_key) },
        ] {
            assert_eq!(Known::from_bytes(&known.to_bytes()), known);
            // Redis keeps longer values out of its compact lists.
            assert!(known.to_bytes().len() <= 64);
        }
        for strange in [&[][..], &[1; 7], &[1; 24]] {
            assert_eq!(Known::from_bytes(strange), Known::default());
        }
    }

    #[test]
    fn a_gap_is_to_blame_for_what_is_missing_after_it() {
        let head = |rev| Head { rev, data: [7; 16] };
        let advanced = |now: Generation, continues| {
            let mut known = Known { head: Some(head(1)), generation: 3, key: None };
            let step = known.advance(head(2), now, |_| continues);
            assert_eq!((known.head, known.generation), (Some(head(2)), now.current as u8));
            step
        };
        let before = Generation { current: 3, lossy: 0 };
        assert_eq!(advanced(before, true), Step::Next);
        assert_eq!(advanced(before, false), Step::Missing);
        // Events that never arrived show in the chain; what was lost after it was appended does not.
        let (outage, loss) = (before.next(false), before.next(true));
        assert_eq!(advanced(outage, true), Step::Next);
        assert_eq!(advanced(outage, false), Step::AfterGap);
        for lost in [loss, loss.next(false), outage.next(true)] {
            assert_eq!(advanced(lost, true), Step::AfterGap, "{lost:?}");
        }
        // The loss was before the head.
        assert_eq!(advanced(Generation { current: 3, lossy: 3 }, true), Step::Next);
        assert_eq!(advanced(Generation { current: 256 + 4, lossy: 256 + 4 }, true), Step::AfterGap);
        let mut known = Known { head: Some(head(2)), ..Known::default() };
        assert_eq!(known.advance(head(2), loss, |_| true), Step::Repeat);
        assert_eq!(known.generation, 0);
    }

    #[test]
    fn accounts_have_distinct_short_fields() {
        assert_eq!(field("did:plc:b2cmtnam6gmcaloqn5hcpa4y").len(), 15);
        let dids = [
            "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa",
            "did:plc:aaaaaaaaaaaaaaaaaaaaaaab",
            "did:plc:short",
            "did:web:example.com",
            "did:plc:AAAAAAAAAAAAAAAAAAAAAAAA",
        ];
        let fields: std::collections::HashSet<Vec<u8>> = dids.iter().map(|did| field(did)).collect();
        assert_eq!(fields.len(), dids.len());
    }

    #[test]
    fn a_commit_follows_only_the_head_that_it_names() {
        let (tree, other) = (Cid::compute(Codec::Drisl, b"tree"), Cid::compute(Codec::Drisl, b"other"));
        let head = Head::new("3jzfcijpj2z2a", &tree);
        assert!(head.is_followed_by(Some("3jzfcijpj2z2a"), Some(&tree)));
        // Without the tree before it, an operation may have been left out.
        assert!(!head.is_followed_by(Some("3jzfcijpj2z2a"), None));
        assert!(!head.is_followed_by(Some("3jzfcijpj2z2a"), Some(&other)));
        assert!(!head.is_followed_by(Some("3jzfcijpj2z2b"), Some(&tree)));
        assert!(!head.is_followed_by(None, None));
    }
}
