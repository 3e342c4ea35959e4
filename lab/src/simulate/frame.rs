//! Events as the bytes of frames: two CBOR objects one after the other, a commit's blocks as a CAR archive within.
//! <https://atproto.com/specs/event-stream>

use bytes::Bytes;
use shrike::car::{BlockRef, CarError, Writer};
use shrike::cbor::{Cid, Codec, Encoder};

use super::accounts::{Accounts, tid};
use super::pool::Rkey;
use super::record::{self, Draft, infallible_vec, time_text};

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

/// The bytes of an event. `pad` bytes of filler go into a commit's blocks.
pub(super) fn encode(planned: &Planned, accounts: &Accounts, pad: usize) -> Frame {
    let time = time_text(planned.micros);
    let seq = planned.seq;
    let bytes = match &planned.what {
        What::Identity { account, handle } => infallible(|out| {
            let mut cbor = header(out, "#identity")?;
            cbor.encode_map_header(if handle.is_some() { 4 } else { 3 })?;
            did_seq_time(&mut cbor, &accounts.did(*account), seq, &time)?;
            if let Some(handle) = handle {
                cbor.encode_text("handle")?;
                cbor.encode_text(handle)?;
            }
            Ok(())
        }),
        What::Account { account, active, status } => infallible(|out| {
            let mut cbor = header(out, "#account")?;
            cbor.encode_map_header(if status.is_some() { 5 } else { 4 })?;
            did_seq_time(&mut cbor, &accounts.did(*account), seq, &time)?;
            cbor.encode_text("active")?;
            cbor.encode_bool(*active)?;
            if let Some(status) = status {
                cbor.encode_text("status")?;
                cbor.encode_text(status)?;
            }
            Ok(())
        }),
        What::Sync { account, rev } => infallible(|out| {
            let did = accounts.did(*account);
            let rev = tid(*rev);
            let node = block(|out| node(out, &[]));
            let commit = block(|out| signed_commit(out, &did, &rev, &node.1, seq));
            let mut car = Vec::with_capacity(512);
            Writer::new(&mut car, &[commit.1])?
                .write_block_ref(BlockRef { cid: commit.1, data: &commit.0 })?;
            let mut cbor = header(out, "#sync")?;
            cbor.encode_map_header(5)?;
            cbor.encode_text("did")?;
            cbor.encode_text(&did)?;
            cbor.encode_text("rev")?;
            cbor.encode_text(&rev)?;
            cbor.encode_text("seq")?;
            cbor.encode_u64(seq)?;
            cbor.encode_text("time")?;
            cbor.encode_text(&time)?;
            cbor.encode_text("blocks")?;
            cbor.encode_bytes(&car)?;
            Ok(())
        }),
        What::Commit { account, rev, since, operations } => {
            let did = accounts.did(*account);
            let commit = Commit { did: &did, rev: &tid(*rev), since: *since, seq, time: &time };
            let done: Vec<Done> =
                operations.iter().map(|it| Done::of(it, planned.micros, accounts)).collect();
            infallible(|out| commit.encode(&done, pad, out))
        }
    };
    Frame { seq: Some(seq), bytes }
}

/// An operation with its record encoded.
struct Done {
    action: &'static str,
    path: String,
    record: Option<(Vec<u8>, Cid)>,
}

impl Done {
    fn of(operation: &Operation, micros: i64, accounts: &Accounts) -> Done {
        let rkey = match operation.rkey {
            Rkey::Tid(bits) => tid(bits),
            Rkey::Own => "self".to_owned(),
        };
        let record = |content: &Content| match content {
            Content::Block(bytes, cid) => (bytes.clone(), *cid),
            Content::Draft(draft, chance) => record::encode(draft, *chance, micros, accounts),
        };
        let (action, record) = match &operation.action {
            Action::Create(content) => ("create", Some(record(content))),
            Action::Update(content) => ("update", Some(record(content))),
            Action::Delete => ("delete", None),
        };
        Done { action, path: format!("{}/{rkey}", operation.collection), record }
    }
}

struct Commit<'a> {
    did: &'a str,
    rev: &'a str,
    since: u64,
    seq: u64,
    time: &'a str,
}

impl Commit<'_> {
    fn encode(&self, operations: &[Done], pad: usize, out: &mut Vec<u8>) -> Result<(), CarError> {
        let node = block(|out| node(out, operations));
        let commit = block(|out| signed_commit(out, self.did, self.rev, &node.1, self.seq));
        let car = car(&commit, &node, operations, pad, self.seq)?;

        out.reserve(car.len() + 512);
        let mut cbor = header(out, "#commit")?;
        cbor.encode_map_header(11)?;
        cbor.encode_text("ops")?;
        cbor.encode_array_header(operations.len() as u64)?;
        for operation in operations {
            cbor.encode_map_header(3)?;
            cbor.encode_text("cid")?;
            match &operation.record {
                Some((_, cid)) => cbor.encode_cid(cid)?,
                None => cbor.encode_null()?,
            }
            cbor.encode_text("path")?;
            cbor.encode_text(&operation.path)?;
            cbor.encode_text("action")?;
            cbor.encode_text(operation.action)?;
        }
        cbor.encode_text("rev")?;
        cbor.encode_text(self.rev)?;
        cbor.encode_text("seq")?;
        cbor.encode_u64(self.seq)?;
        cbor.encode_text("repo")?;
        cbor.encode_text(self.did)?;
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
        cbor.encode_cid(&commit.1)?;
        cbor.encode_text("rebase")?;
        cbor.encode_bool(false)?;
        cbor.encode_text("tooBig")?;
        cbor.encode_bool(false)?;
        Ok(())
    }
}

fn car(
    commit: &(Vec<u8>, Cid),
    node: &(Vec<u8>, Cid),
    operations: &[Done],
    pad: usize,
    seq: u64,
) -> Result<Vec<u8>, CarError> {
    /// Tree nodes of real frames are about as long.
    const FILLER: usize = 700;
    let records = || operations.iter().filter_map(|operation| operation.record.as_ref());
    let size =
        400 + commit.0.len() + node.0.len() + records().map(|(data, _)| data.len() + 40).sum::<usize>();
    let mut out = Vec::with_capacity(size + pad + pad / 8);
    let mut writer = Writer::new(&mut out, &[commit.1])?;
    for (data, cid) in [commit, node] {
        writer.write_block_ref(BlockRef { cid: *cid, data })?;
    }
    for (data, cid) in records() {
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

/// The signed root of a repository. The signature is fake, but has the right size.
fn signed_commit(out: &mut Vec<u8>, did: &str, rev: &str, data: &Cid, chance: u64) -> Result<(), CarError> {
    let mut sig = [0; 64];
    fastrand::Rng::with_seed(chance).fill(&mut sig);
    let mut cbor = Encoder::new(out);
    cbor.encode_map_header(6)?;
    cbor.encode_text("did")?;
    cbor.encode_text(did)?;
    cbor.encode_text("rev")?;
    cbor.encode_text(rev)?;
    cbor.encode_text("sig")?;
    cbor.encode_bytes(&sig)?;
    cbor.encode_text("data")?;
    cbor.encode_cid(data)?;
    cbor.encode_text("prev")?;
    cbor.encode_null()?;
    cbor.encode_text("version")?;
    cbor.encode_u64(3)?;
    Ok(())
}

/// A node of a repository's tree that holds the commit's records and nothing else: it has the form of the real one,
/// not its place in a tree.
fn node(out: &mut Vec<u8>, operations: &[Done]) -> Result<(), CarError> {
    let mut entries: Vec<(&str, &Cid)> = operations
        .iter()
        .filter_map(|operation| operation.record.as_ref().map(|(_, cid)| (operation.path.as_str(), cid)))
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

fn block(write: impl FnOnce(&mut Vec<u8>) -> Result<(), CarError>) -> (Vec<u8>, Cid) {
    let bytes = infallible_vec(write);
    let cid = Cid::compute(Codec::Drisl, &bytes);
    (bytes, cid)
}

fn infallible(write: impl FnOnce(&mut Vec<u8>) -> Result<(), CarError>) -> Bytes {
    Bytes::from(infallible_vec(write))
}
