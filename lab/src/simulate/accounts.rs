//! The accounts of the simulated network: identifiers, handles, status, and their repositories' clocks.

use shrike::cbor::Cid;

/// What the protocol says about whether an account's content is to be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Active,
    Deactivated,
    Suspended,
    Takendown,
    Deleted,
}

impl Status {
    /// The word on the wire; none for an active account.
    pub(super) fn name(self) -> Option<&'static str> {
        match self {
            Status::Active => None,
            Status::Deactivated => Some("deactivated"),
            Status::Suspended => Some("suspended"),
            Status::Takendown => Some("takendown"),
            Status::Deleted => Some("deleted"),
        }
    }
}

pub(super) struct Account {
    /// The handle, once it is another than the one that every account begins with.
    pub(super) handle: Option<Box<str>>,
    pub(super) status: Status,
    pub(super) has_profile: bool,
    /// The revision of the last commit; 0 before the first.
    pub(super) rev: u64,
    /// The last TID that the repository used, for a record or a revision.
    last_tid: u64,
}

/// Everybody who has appeared so far, by number; 0 appeared first and is the most popular.
pub(super) struct Accounts {
    seed: u64,
    list: Vec<Account>,
}

impl Accounts {
    pub(super) fn new(seed: u64) -> Self {
        Accounts { seed, list: Vec::new() }
    }

    pub(super) fn len(&self) -> u32 {
        // The options count accounts in 32 bits.
        u32::try_from(self.list.len()).unwrap_or(u32::MAX)
    }

    /// Lets the next account appear; returns its number.
    pub(super) fn add(&mut self) -> u32 {
        let number = self.len();
        self.list.push(Account {
            handle: None,
            status: Status::Active,
            has_profile: false,
            rev: 0,
            last_tid: 0,
        });
        number
    }

    pub(super) fn get(&self, number: u32) -> &Account {
        &self.list[number as usize]
    }

    pub(super) fn get_mut(&mut self, number: u32) -> &mut Account {
        &mut self.list[number as usize]
    }

    pub(super) fn is_active(&self, number: u32) -> bool {
        self.get(number).status == Status::Active
    }

    /// `did:plc:` and 24 characters that follow from the seed and the number, different for different numbers.
    pub(super) fn did(&self, number: u32) -> String {
        const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
        // The first 13 characters hold all 64 bits of a one-to-one function of the number, so that no two are equal.
        let first = mix(mix(self.seed).wrapping_add(u64::from(number)));
        let second = mix(!first);
        let mut did = String::with_capacity(32);
        did.push_str("did:plc:");
        for place in 0..13 {
            did.push(char::from(ALPHABET[(first >> (5 * place) & 31) as usize]));
        }
        for place in 0..11 {
            did.push(char::from(ALPHABET[(second >> (5 * place) & 31) as usize]));
        }
        did
    }

    pub(super) fn handle(&self, number: u32) -> String {
        match &self.get(number).handle {
            Some(handle) => handle.to_string(),
            None => format!("user{number}.test"),
        }
    }

    /// A TID of this moment that is greater than every earlier one of the same account.
    pub(super) fn next_tid(&mut self, number: u32, micros: i64) -> u64 {
        let clock = mix(self.seed ^ u64::from(number)) & 0x3ff;
        let account = self.get_mut(number);
        let now = u64::try_from(micros).unwrap_or(0) << 10 | clock;
        // One microsecond on, so that the clock's own bits stay.
        account.last_tid = now.max(account.last_tid + 1024);
        account.last_tid
    }
}

/// A strong reference: a record's address and what it said.
#[derive(Clone, Copy, Debug)]
pub(super) struct StrongRef {
    pub(super) owner: u32,
    pub(super) collection: &'static str,
    pub(super) rkey: u64,
    pub(super) cid: Cid,
}

/// Sixty-four bits in their text form: 13 characters whose order is that of the numbers.
/// <https://atproto.com/specs/tid>
pub(super) fn tid(bits: u64) -> String {
    const ALPHABET: &[u8; 32] = b"234567abcdefghijklmnopqrstuvwxyz";
    (0..13).map(|place| char::from(ALPHABET[(bits >> (60 - 5 * place) & 31) as usize])).collect()
}

/// One-to-one, and well mixed (the finalizer of splitmix64).
pub(super) fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}
