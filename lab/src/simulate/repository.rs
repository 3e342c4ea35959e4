//! The accounts' repositories: a tree of records each, signed by its account. <https://atproto.com/specs/repository>

#![expect(clippy::expect_used, reason = "the trees are complete in memory, and every path is a valid key")]

use std::collections::{BTreeMap, HashMap};

use shrike::car::{BlockRef, CarError, Writer};
use shrike::cbor::{Cid, Codec, Encoder};
use shrike::mst::{DetachedTree, NoBlocks};

use super::accounts::tid;
use super::key::Key;
use super::record::infallible_vec;

const COMPLETE: &str = "the tree is complete in memory";

/// The repositories, by account number.
pub(super) struct Repositories {
    seed: u64,
    /// Whether the records themselves are kept as well, which only a server of whole repositories needs.
    keeps_records: bool,
    list: Vec<Repository>,
}

#[derive(Default)]
struct Repository {
    tree: DetachedTree,
    /// The tree's nodes since the last flush.
    nodes: HashMap<Cid, Vec<u8>>,
    root: Option<Cid>,
    records: BTreeMap<String, (Cid, Vec<u8>)>,
    rev: u64,
    changes: u32,
}

/// What happens to one record.
pub(super) struct Change {
    pub(super) path: String,
    /// The record, or none if it is deleted.
    pub(super) record: Option<(Vec<u8>, Cid)>,
    /// The record before.
    pub(super) prev: Option<Cid>,
}

/// What a commit consists of besides its changes.
pub(super) struct Proof {
    /// The signed commit.
    pub(super) commit: (Vec<u8>, Cid),
    /// The nodes that show what has changed.
    pub(super) nodes: Vec<(Vec<u8>, Cid)>,
    /// The tree's root before; none at the first commit.
    pub(super) prev_data: Option<Cid>,
}

impl Repositories {
    pub(super) fn new(seed: u64, keeps_records: bool) -> Self {
        Self { seed, keeps_records, list: Vec::new() }
    }

    fn repository(&mut self, account: u32) -> &mut Repository {
        let account = account as usize;
        if account >= self.list.len() {
            self.list.resize_with(account + 1, Repository::default);
        }
        &mut self.list[account]
    }

    /// Makes the changes without proving them; fills in what was there before.
    pub(super) fn change(&mut self, account: u32, rev: u64, changes: &mut [Change]) {
        let keeps_records = self.keeps_records;
        let repository = self.repository(account);
        repository.rev = rev;
        for Change { path, record, prev } in changes {
            *prev = match record {
                Some((_, cid)) => repository.tree.insert(&NoBlocks, path.clone(), *cid).expect(COMPLETE),
                None => repository.tree.remove(&NoBlocks, path).expect(COMPLETE),
            };
            match record {
                Some((bytes, cid)) if keeps_records => {
                    repository.records.insert(path.clone(), (*cid, bytes.clone()));
                }
                _ => _ = repository.records.remove(path),
            }
        }
    }

    /// Makes the changes of a commit, and proves and signs them.
    pub(super) fn commit(&mut self, account: u32, did: &str, rev: u64, changes: &mut [Change]) -> Proof {
        let first = self.repository(account).rev == 0;
        let before = self.flush(account);
        self.change(account, rev, changes);
        let data = self.flush(account);
        let repository = self.repository(account);
        let mut proof = repository
            .tree
            .covering_proof(&NoBlocks, changes.iter().map(|change| change.path.as_str()))
            .expect(COMPLETE);
        proof.push(data);
        proof.sort_unstable();
        proof.dedup();
        let nodes = proof.into_iter().map(|cid| (repository.nodes[&cid].clone(), cid)).collect();
        let commit = self.signed(account, did);
        Proof { commit, nodes, prev_data: (!first).then_some(before) }
    }

    /// A new revision without a change.
    pub(super) fn renew(&mut self, account: u32, did: &str, rev: u64) -> (Vec<u8>, Cid) {
        self.repository(account).rev = rev;
        self.flush(account);
        self.signed(account, did)
    }

    /// From now on, the account signs with its next key.
    pub(super) fn change_key(&mut self, account: u32) {
        self.repository(account).changes += 1;
    }

    /// How often the account has changed its key.
    pub(super) fn changes_of_key(&self, account: u32) -> u32 {
        self.list.get(account as usize).map_or(0, |repository| repository.changes)
    }

    /// What an account that is deleted leaves behind: its name.
    pub(super) fn delete(&mut self, account: u32) {
        *self.repository(account) = Repository::default();
    }

    /// The revision and the signed commit; none if there never was one.
    pub(super) fn head(&mut self, account: u32, did: &str) -> Option<(String, Cid)> {
        let rev = self.list.get(account as usize).filter(|repository| repository.rev != 0)?.rev;
        self.flush(account);
        Some((tid(rev), self.signed(account, did).1))
    }

    /// All of it, as a CAR archive; none if there never was a commit.
    pub(super) fn archive(&mut self, account: u32, did: &str) -> Option<Vec<u8>> {
        self.list.get(account as usize).filter(|repository| repository.rev != 0)?;
        self.flush(account);
        let (commit, root) = self.signed(account, did);
        let repository = self.repository(account);
        Some(infallible_vec(|out| {
            let mut writer = Writer::new(out, &[root])?;
            writer.write_block_ref(BlockRef { cid: root, data: &commit })?;
            for (cid, data) in &repository.nodes {
                writer.write_block_ref(BlockRef { cid: *cid, data })?;
            }
            // Records that say the same are one block.
            let records: HashMap<&Cid, &Vec<u8>> =
                repository.records.values().map(|(cid, data)| (cid, data)).collect();
            for (cid, data) in records {
                writer.write_block_ref(BlockRef { cid: *cid, data })?;
            }
            Ok(())
        }))
    }

    /// Writes the nodes that have changed; returns the root.
    fn flush(&mut self, account: u32) -> Cid {
        let repository = self.repository(account);
        let written = repository.tree.flush().expect(COMPLETE);
        for cid in written.retired {
            repository.nodes.remove(&cid);
        }
        repository.nodes.extend(written.new_blocks);
        repository.root = Some(written.root);
        written.root
    }

    fn signed(&mut self, account: u32, did: &str) -> (Vec<u8>, Cid) {
        let key = Key::of(self.seed, account, self.changes_of_key(account));
        let repository = self.repository(account);
        let data = repository.root.expect("flushed before");
        signed_commit(did, &tid(repository.rev), &data, &key)
    }
}

/// The root of a repository, signed.
pub(super) fn signed_commit(did: &str, rev: &str, data: &Cid, key: &Key) -> (Vec<u8>, Cid) {
    let unsigned = infallible_vec(|out| commit_object(out, did, rev, data, None));
    let sig = key.sign(Cid::compute(Codec::Drisl, &unsigned).hash());
    let signed = infallible_vec(|out| commit_object(out, did, rev, data, Some(&sig)));
    let cid = Cid::compute(Codec::Drisl, &signed);
    (signed, cid)
}

/// The root of a repository, with or without a signature.
pub(super) fn commit_object(
    out: &mut Vec<u8>,
    did: &str,
    rev: &str,
    data: &Cid,
    sig: Option<&[u8; 64]>,
) -> Result<(), CarError> {
    let mut cbor = Encoder::new(out);
    cbor.encode_map_header(if sig.is_some() { 6 } else { 5 })?;
    cbor.encode_text("did")?;
    cbor.encode_text(did)?;
    cbor.encode_text("rev")?;
    cbor.encode_text(rev)?;
    if let Some(sig) = sig {
        cbor.encode_text("sig")?;
        cbor.encode_bytes(sig)?;
    }
    cbor.encode_text("data")?;
    cbor.encode_cid(data)?;
    cbor.encode_text("prev")?;
    cbor.encode_null()?;
    cbor.encode_text("version")?;
    cbor.encode_u64(3)?;
    Ok(())
}
