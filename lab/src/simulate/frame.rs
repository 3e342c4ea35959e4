//! Events as the bytes of frames: two CBOR objects one after the other, a commit's blocks as a CAR archive within.
//! <https://atproto.com/specs/event-stream>

use bytes::Bytes;
use shrike::car::{BlockRef, CarError, Writer};
use shrike::cbor::{Cid, Codec, Encoder};

use super::accounts::{Accounts, tid};
use super::lie::Lie;
use super::pool::Rkey;
use super::record::{self, Draft, infallible_vec, time_text};
use super::repository::{Change, Proof, Repositories, commit_object};

/// One message of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The relay's sequence number; `#info` and error frames have none.
    pub seq: Option<u64>,
    /// The message as it goes over the websocket.
    pub bytes: Bytes,
}

/// An event that has happened but is not encoded yet.
pub(super) struct Planned {
    pub(super) seq: u64,
    /// Microseconds since 1970.
    pub(super) micros: i64,
    pub(super) what: What,
}

pub(super) enum What {
    Identity {
        account: u32,
        handle: Option<String>,
    },
    /// `status` may be set although the account is active (throttled, desynchronized).
    Account {
        account: u32,
        active: bool,
        status: Option<&'static str>,
    },
    Sync {
        account: u32,
        rev: u64,
    },
    /// `since` is the revision before, 0 at the first.
    Commit {
        account: u32,
        rev: u64,
        since: u64,
        operations: Vec<Operation>,
    },
}

pub(super) struct Operation {
    pub(super) collection: &'static str,
    pub(super) rkey: Rkey,
    pub(super) action: Action,
}

pub(super) enum Action {
    Create(Content),
    Update(Content),
    Delete,
}

/// A record, encoded only if somebody needs it: a consumer that resumes skips most of them.
pub(super) enum Content {
    /// Encoded already, because others refer to its CID.
    Block(Vec<u8>, Cid),
    /// To be encoded; the number is where its chance comes from.
    Draft(Draft, u64),
}

/// The error that a relay sends for a cursor that it has not reached yet.
pub(super) fn future_cursor() -> Bytes {
    infallible(|out| {
        let mut cbor = Encoder::new(out);
        cbor.encode_map_header(1)?;
        cbor.encode_text("op")?;
        cbor.encode_i64(-1)?;
        cbor.encode_map_header(2)?;
        cbor.encode_text("error")?;
        cbor.encode_text("FutureCursor")?;
        cbor.encode_text("message")?;
        cbor.encode_text("Cursor in the future.")?;
        Ok(())
    })
}

/// What a relay says to a consumer whose cursor is older than everything that it still has.
pub(super) fn outdated_cursor() -> Bytes {
    infallible(|out| {
        let mut cbor = Encoder::new(out);
        cbor.encode_map_header(2)?;
        cbor.encode_text("t")?;
        cbor.encode_text("#info")?;
        cbor.encode_text("op")?;
        cbor.encode_i64(1)?;
        cbor.encode_map_header(2)?;
        cbor.encode_text("name")?;
        cbor.encode_text("OutdatedCursor")?;
        cbor.encode_text("message")?;
        cbor.encode_text("Requested cursor exceeded limit. Possibly missing events.")?;
        Ok(())
    })
}

/// What an event is written down with.
pub(super) struct Paper<'a> {
    pub(super) accounts: &'a Accounts,
    /// The repositories of a network that signs; in one that does not, signatures and trees only look like real ones.
    pub(super) repositories: Option<&'a mut Repositories>,
    /// What is wrong with a commit, on purpose.
    pub(super) lie: Option<Lie>,
    /// Bytes of filler in a commit's blocks.
    pub(super) pad: usize,
}

/// The bytes of an event.
pub(super) fn encode(planned: &Planned, paper: &mut Paper<'_>) -> Frame {
    let time = time_text(planned.micros);
    let seq = planned.seq;
    let bytes = match &planned.what {
        What::Identity { account, handle } => {
            let did = paper.accounts.did(*account);
            infallible(|out| identity(out, (&did, seq, &time), handle.as_deref()))
        }
        What::Account { account, active, status } => {
            let did = paper.accounts.did(*account);
            infallible(|out| account_status(out, (&did, seq, &time), *active, *status))
        }
        What::Sync { account, rev } => {
            let did = paper.accounts.did(*account);
            let rev_text = tid(*rev);
            let commit = match &mut paper.repositories {
                Some(repositories) => repositories.renew(*account, &did, *rev),
                None => imitation(&did, &rev_text, &[], seq).commit,
            };
            infallible(|out| sync(out, (&did, seq, &time), &rev_text, &commit))
        }
        What::Commit { account, rev, since, operations } => {
            let did = paper.accounts.did(*account);
            let mut changes = changes(operations, planned.micros, paper.accounts);
            let proof = match &mut paper.repositories {
                Some(repositories) => repositories.commit(*account, &did, *rev, &mut changes),
                None => imitation(&did, &tid(*rev), &changes, seq),
            };
            let mut commit = Commit {
                did,
                rev: tid(*rev),
                since: *since,
                seq,
                time: &time,
                is_signed: paper.repositories.is_some(),
                changes,
                proof,
                actions: operations.iter().map(Operation::action).collect(),
            };
            if let Some(lie) = paper.lie {
                lie.tell(&mut commit);
            }
            infallible(|out| commit.encode(paper.pad, out))
        }
    };
    Frame { seq: Some(seq), bytes }
}

/// Whose event it is, its number and its time.
type Whose<'a> = (&'a str, u64, &'a str);

fn identity(out: &mut Vec<u8>, (did, seq, time): Whose<'_>, handle: Option<&str>) -> Result<(), CarError> {
    let mut cbor = header(out, "#identity")?;
    cbor.encode_map_header(if handle.is_some() { 4 } else { 3 })?;
    did_seq_time(&mut cbor, did, seq, time)?;
    if let Some(handle) = handle {
        cbor.encode_text("handle")?;
        cbor.encode_text(handle)?;
    }
    Ok(())
}

fn account_status(
    out: &mut Vec<u8>,
    (did, seq, time): Whose<'_>,
    active: bool,
    status: Option<&str>,
) -> Result<(), CarError> {
    let mut cbor = header(out, "#account")?;
    cbor.encode_map_header(if status.is_some() { 5 } else { 4 })?;
    did_seq_time(&mut cbor, did, seq, time)?;
    cbor.encode_text("active")?;
    cbor.encode_bool(active)?;
    if let Some(status) = status {
        cbor.encode_text("status")?;
        cbor.encode_text(status)?;
    }
    Ok(())
}

fn sync(
    out: &mut Vec<u8>,
    (did, seq, time): Whose<'_>,
    rev: &str,
    commit: &(Vec<u8>, Cid),
) -> Result<(), CarError> {
    let mut car = Vec::with_capacity(512);
    Writer::new(&mut car, &[commit.1])?.write_block_ref(BlockRef { cid: commit.1, data: &commit.0 })?;
    let mut cbor = header(out, "#sync")?;
    cbor.encode_map_header(5)?;
    cbor.encode_text("did")?;
    cbor.encode_text(did)?;
    cbor.encode_text("rev")?;
    cbor.encode_text(rev)?;
    cbor.encode_text("seq")?;
    cbor.encode_u64(seq)?;
    cbor.encode_text("time")?;
    cbor.encode_text(time)?;
    cbor.encode_text("blocks")?;
    cbor.encode_bytes(&car)?;
    Ok(())
}

/// What happens to the repository's records.
pub(super) fn changes(operations: &[Operation], micros: i64, accounts: &Accounts) -> Vec<Change> {
    let record = |content: &Content| match content {
        Content::Block(bytes, cid) => (bytes.clone(), *cid),
        Content::Draft(draft, chance) => record::encode(draft, *chance, micros, accounts),
    };
    let change = |operation: &Operation| {
        let rkey = match operation.rkey {
            Rkey::Tid(bits) => tid(bits),
            Rkey::Own => "self".to_owned(),
        };
        let record = match &operation.action {
            Action::Create(content) | Action::Update(content) => Some(record(content)),
            Action::Delete => None,
        };
        Change { path: format!("{}/{rkey}", operation.collection), record, prev: None }
    };
    operations.iter().map(change).collect()
}

impl Operation {
    fn action(&self) -> &'static str {
        match self.action {
            Action::Create(_) => "create",
            Action::Update(_) => "update",
            Action::Delete => "delete",
        }
    }
}

/// A commit before it is encoded.
pub(super) struct Commit<'a> {
    pub(super) did: String,
    pub(super) rev: String,
    /// 0 at the first.
    pub(super) since: u64,
    seq: u64,
    time: &'a str,
    is_signed: bool,
    pub(super) changes: Vec<Change>,
    pub(super) proof: Proof,
    /// What a network that does not sign calls its operations.
    actions: Vec<&'static str>,
}

impl Commit<'_> {
    fn action(&self, place: usize) -> &'static str {
        match &self.changes[place] {
            _ if !self.is_signed => self.actions[place],
            Change { record: None, .. } => "delete",
            // The simulated account forgets what it has, and creates some of it again.
            Change { prev: Some(_), .. } => "update",
            Change { prev: None, .. } => "create",
        }
    }

    fn encode(&self, pad: usize, out: &mut Vec<u8>) -> Result<(), CarError> {
        let car = car(&self.proof, &self.changes, pad, self.seq)?;
        out.reserve(car.len() + 512);
        let mut cbor = header(out, "#commit")?;
        cbor.encode_map_header(if self.proof.prev_data.is_some() { 12 } else { 11 })?;
        cbor.encode_text("ops")?;
        cbor.encode_array_header(self.changes.len() as u64)?;
        for (place, change) in self.changes.iter().enumerate() {
            cbor.encode_map_header(if change.prev.is_some() { 4 } else { 3 })?;
            cbor.encode_text("cid")?;
            match &change.record {
                Some((_, cid)) => cbor.encode_cid(cid)?,
                None => cbor.encode_null()?,
            }
            cbor.encode_text("path")?;
            cbor.encode_text(&change.path)?;
            if let Some(prev) = &change.prev {
                cbor.encode_text("prev")?;
                cbor.encode_cid(prev)?;
            }
            cbor.encode_text("action")?;
            cbor.encode_text(self.action(place))?;
        }
        cbor.encode_text("rev")?;
        cbor.encode_text(&self.rev)?;
        cbor.encode_text("seq")?;
        cbor.encode_u64(self.seq)?;
        cbor.encode_text("repo")?;
        cbor.encode_text(&self.did)?;
        cbor.encode_text("time")?;
        cbor.encode_text(self.time)?;
        cbor.encode_text("blobs")?;
        cbor.encode_array_header(0)?;
        cbor.encode_text("since")?;
        match self.since {
            0 => cbor.encode_null()?,
            since => cbor.encode_text(&tid(since))?,
        }
        cbor.encode_text("blocks")?;
        cbor.encode_bytes(&car)?;
        cbor.encode_text("commit")?;
        cbor.encode_cid(&self.proof.commit.1)?;
        cbor.encode_text("rebase")?;
        cbor.encode_bool(false)?;
        cbor.encode_text("tooBig")?;
        cbor.encode_bool(false)?;
        if let Some(prev_data) = &self.proof.prev_data {
            cbor.encode_text("prevData")?;
            cbor.encode_cid(prev_data)?;
        }
        Ok(())
    }
}

fn car(proof: &Proof, changes: &[Change], pad: usize, seq: u64) -> Result<Vec<u8>, CarError> {
    /// Tree nodes of real frames are about as long.
    const FILLER: usize = 700;
    let blocks = || {
        let records = changes.iter().filter_map(|change| change.record.as_ref());
        std::iter::once(&proof.commit).chain(&proof.nodes).chain(records)
    };
    let size = 400 + blocks().map(|(data, _)| data.len() + 40).sum::<usize>();
    let mut out = Vec::with_capacity(size + pad + pad / 8);
    let mut writer = Writer::new(&mut out, &[proof.commit.1])?;
    for (data, cid) in blocks() {
        writer.write_block_ref(BlockRef { cid: *cid, data })?;
    }
    let mut rest = pad.min(1_000_000);
    let mut rng = fastrand::Rng::with_seed(seq);
    while rest > 0 {
        let mut filler = [0; FILLER];
        let filler = &mut filler[..rest.min(FILLER)];
        rng.fill(filler);
        let (data, cid) = block(|out| Ok(Encoder::new(out).encode_bytes(filler)?));
        writer.write_block_ref(BlockRef { cid, data: &data })?;
        rest -= filler.len();
    }
    Ok(out)
}

/// What a network that does not sign shows instead of a proof: a signature and a node of the right size, with the
/// commit's records and nothing else in it.
fn imitation(did: &str, rev: &str, changes: &[Change], chance: u64) -> Proof {
    let node = block(|out| node(out, changes));
    let mut sig = [0; 64];
    fastrand::Rng::with_seed(chance).fill(&mut sig);
    let commit = block(|out| commit_object(out, did, rev, &node.1, Some(&sig)));
    Proof { commit, nodes: vec![node], prev_data: None }
}

fn node(out: &mut Vec<u8>, changes: &[Change]) -> Result<(), CarError> {
    let mut entries: Vec<(&str, &Cid)> = changes
        .iter()
        .filter_map(|change| change.record.as_ref().map(|(_, cid)| (change.path.as_str(), cid)))
        .collect();
    entries.sort_unstable();
    let mut cbor = Encoder::new(out);
    cbor.encode_map_header(2)?;
    cbor.encode_text("e")?;
    cbor.encode_array_header(entries.len() as u64)?;
    let mut before = "";
    for (path, cid) in entries {
        let shared = path.bytes().zip(before.bytes()).take_while(|(a, b)| a == b).count();
        before = path;
        cbor.encode_map_header(4)?;
        cbor.encode_text("k")?;
        cbor.encode_bytes(&path.as_bytes()[shared..])?;
        cbor.encode_text("p")?;
        cbor.encode_u64(shared as u64)?;
        cbor.encode_text("t")?;
        cbor.encode_null()?;
        cbor.encode_text("v")?;
        cbor.encode_cid(cid)?;
    }
    cbor.encode_text("l")?;
    cbor.encode_null()?;
    Ok(())
}

fn header<'a>(out: &'a mut Vec<u8>, kind: &str) -> Result<Encoder<&'a mut Vec<u8>>, CarError> {
    let mut cbor = Encoder::new(out);
    cbor.encode_map_header(2)?;
    cbor.encode_text("t")?;
    cbor.encode_text(kind)?;
    cbor.encode_text("op")?;
    cbor.encode_u64(1)?;
    Ok(cbor)
}

fn did_seq_time(cbor: &mut Encoder<&mut Vec<u8>>, did: &str, seq: u64, time: &str) -> Result<(), CarError> {
    cbor.encode_text("did")?;
    cbor.encode_text(did)?;
    cbor.encode_text("seq")?;
    cbor.encode_u64(seq)?;
    cbor.encode_text("time")?;
    cbor.encode_text(time)?;
    Ok(())
}

pub(super) fn block(write: impl FnOnce(&mut Vec<u8>) -> Result<(), CarError>) -> (Vec<u8>, Cid) {
    let bytes = infallible_vec(write);
    let cid = Cid::compute(Codec::Drisl, &bytes);
    (bytes, cid)
}

fn infallible(write: impl FnOnce(&mut Vec<u8>) -> Result<(), CarError>) -> Bytes {
    Bytes::from(infallible_vec(write))
}
