//! Verification: the protocol's official vectors (`tests/fixtures/interop`, CC0), the recording of a real server, and
//! every way to tamper with it.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::Value;
use shrike::car::{Block, read_all, write_all};
use shrike::cbor::json::{decode_base64, parse_cid};
use shrike::cbor::{Cid, Codec, Value as Cbor, decode, encode_value};
use shrike::mst::{DetachedTree, NoBlocks, height_for_key};
use standpipe::event::{check_rev, tid_time};
use standpipe::origin::relay::decode::{Claimed, claim};
use standpipe::verify::document::Document;
use standpipe::verify::{self, Archive, Claim, ClaimedOp, Fault, Key, SignedCommit, Sound};
use standpipe_lab::simulate::read_frames;

/// A time after the recording.
const NOW: u64 = 1_800_000_000_000;

fn fixture(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn vectors(name: &str) -> Vec<Value> {
    let vectors: Vec<Value> = serde_json::from_str(&fixture(&format!("interop/{name}"))).unwrap();
    assert!(!vectors.is_empty());
    vectors
}

fn lines(name: &str) -> Vec<String> {
    let lines: Vec<String> = fixture(&format!("interop/{name}"))
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .map(str::to_owned)
        .collect();
    assert!(!lines.is_empty());
    lines
}

// ---------------------------------------------------------------------------------------------
// The official vectors

#[test]
fn signatures_are_judged_as_the_official_vectors_say() {
    for vector in vectors("crypto/signature-fixtures.json") {
        let text = |name: &str| vector[name].as_str().unwrap();
        let message = decode_base64(text("messageBase64")).unwrap();
        let signature = decode_base64(text("signatureBase64")).unwrap();
        let keys = [
            Key::from_did_key(text("publicKeyDid")).unwrap(),
            Key::from_method(text("didDocSuite"), text("publicKeyMultibase")).unwrap(),
        ];
        assert_eq!(keys[0], keys[1], "{}", vector["comment"]);
        let valid = keys[0].verify_hash(Cid::compute(Codec::Raw, &message).hash(), &signature);
        assert_eq!(valid, vector["validSignature"].as_bool().unwrap(), "{}", vector["comment"]);
    }
}

#[test]
fn official_keys_are_read_and_written_unchanged() {
    for name in ["crypto/w3c_didkey_K256.json", "crypto/w3c_didkey_P256.json"] {
        for vector in vectors(name) {
            let did = vector["publicDidKey"].as_str().unwrap();
            let key = Key::from_did_key(did).unwrap();
            assert_eq!(format!("did:key:{}", key.to_multikey()), did);
            assert_eq!(Key::from_bytes(&key.to_bytes()).unwrap(), key);
        }
    }
    for bad in ["", "did:key:", "did:key:zQ3sh", "did:key:z0OIl", "did:web:example.com"] {
        assert!(Key::from_did_key(bad).is_err(), "{bad}");
    }
}

#[test]
fn keys_lie_as_high_in_the_tree_as_the_official_vectors_say() {
    for vector in vectors("mst/key_heights.json") {
        let key = vector["key"].as_str().unwrap();
        assert_eq!(u64::from(height_for_key(key)), vector["height"].as_u64().unwrap(), "{key}");
    }
}

#[test]
fn revisions_are_judged_as_the_official_vectors_say() {
    for tid in lines("syntax/tid_syntax_valid.txt") {
        assert!(tid_time(&tid).is_some(), "{tid}");
    }
    for tid in lines("syntax/tid_syntax_invalid.txt") {
        assert!(tid_time(&tid).is_none() && check_rev(&tid, NOW).is_err(), "{tid}");
    }
}

/// Each vector is a tree before and after some operations, and the blocks that suffice to undo them.
#[test]
fn operations_are_undone_on_the_blocks_of_the_official_proofs() {
    for vector in vectors("firehose/commit-proof-fixtures.json") {
        let texts = |name: &str| -> Vec<String> {
            vector[name].as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
        };
        let link = |name: &str| parse_cid(vector[name].as_str().unwrap()).unwrap();
        let leaf = link("leafValue");
        let mut tree = DetachedTree::new();
        for key in texts("keys") {
            tree.insert(&NoBlocks, key, leaf).unwrap();
        }
        let before = tree.flush().unwrap();
        assert_eq!(before.root, link("rootBeforeCommit"), "{}", vector["comment"]);
        let mut blocks: HashMap<Cid, Vec<u8>> = before.new_blocks.into_iter().collect();
        for key in texts("adds") {
            tree.insert(&NoBlocks, key, leaf).unwrap();
        }
        for key in texts("dels") {
            tree.remove(&NoBlocks, &key).unwrap();
        }
        let after = tree.flush().unwrap();
        assert_eq!(after.root, link("rootAfterCommit"));
        blocks.extend(after.new_blocks);
        let proof: Vec<Block> = texts("blocksInProof")
            .iter()
            .map(|cid| parse_cid(cid).unwrap())
            .map(|cid| Block { cid, data: blocks[&cid].clone() })
            .collect();

        let op = |action, path, cid, prev| ClaimedOp { action, path, cid, prev };
        let (adds, dels) = (texts("adds"), texts("dels"));
        let ops: Vec<ClaimedOp<'_>> = adds
            .iter()
            .map(|path| op("create", path.as_str(), Some(leaf), None))
            .chain(dels.iter().map(|path| op("delete", path.as_str(), None, Some(leaf))))
            .collect();
        let judged = judge_tree(&proof, before.root, after.root, &ops);
        assert!(judged == Ok(true), "{}: {judged:?}", vector["comment"]);
        // One operation fewer.
        let fault = judge_tree(&proof, before.root, after.root, &ops[1..]).unwrap_err().fault;
        assert_eq!(fault, Fault::Operations, "{}", vector["comment"]);
    }
}

/// Judges operations between two trees. The records are not what these vectors are about.
fn judge_tree(
    proof: &[Block],
    before: Cid,
    after: Cid,
    ops: &[ClaimedOp<'_>],
) -> Result<bool, verify::Invalid> {
    let car = write_all(&[after], proof).unwrap();
    let claim = Claim {
        did: "did:plc:vector",
        rev: "3jzfcijpj2z2a",
        since: Some("3jzfcijpj2y2a"),
        prev_data: Some(before),
        commit: None,
        ops: ops.to_vec(),
        blocks: &car,
    };
    verify::undo(&claim, &Archive::read(&car)?, after)
}

// ---------------------------------------------------------------------------------------------
// The recording

/// The recording's commits and syncs. Its DID documents were not recorded: `pds-live.keys.json` holds the one key of each
/// account that ECDSA's public-key recovery finds in all of its signatures.
fn recording() -> (Vec<Vec<u8>>, BTreeMap<String, Key>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pds-live.frames");
    let frames = read_frames(&path).unwrap().into_iter().map(|frame| frame.bytes.to_vec());
    let signed = |frame: &Vec<u8>| matches!(claim(frame), Some(Claimed::Commit(_) | Claimed::Sync(_)));
    let frames = frames.filter(signed).collect();
    let keys: BTreeMap<String, String> = serde_json::from_str(&fixture("pds-live.keys.json")).unwrap();
    let keys = keys.into_iter().map(|(did, key)| (did, Key::from_did_key(&key).unwrap())).collect();
    (frames, keys)
}

fn judge(frame: &[u8]) -> Result<Sound, verify::Invalid> {
    match claim(frame).unwrap() {
        Claimed::Commit(claim) => verify::commit(&claim, NOW),
        Claimed::Sync(claim) => verify::sync(&claim, NOW),
        Claimed::Identity(did) => panic!("{did}"),
    }
}

#[test]
fn everything_a_real_server_sent_holds() {
    let (frames, keys) = recording();
    let mut heads: HashMap<String, (String, Cid)> = HashMap::new();
    let (mut signatures, mut inversions, mut chained) = (0, 0, 0);
    for frame in &frames {
        let sound = judge(frame).unwrap();
        assert!(sound.commit.is_signed_by(&keys[&sound.commit.did]), "{}", sound.commit.did);
        signatures += 1;
        if let Claimed::Commit(claim) = claim(frame).unwrap() {
            assert!(sound.inverted);
            inversions += 1;
            if let Some((rev, data)) = heads.get(claim.did) {
                assert_eq!((claim.since, claim.prev_data), (Some(rev.as_str()), Some(*data)));
                chained += 1;
            }
        }
        heads.insert(sound.commit.did.clone(), (sound.commit.rev, sound.commit.data));
    }
    assert!(
        signatures > inversions && inversions > 90 && chained > 80,
        "{signatures} {inversions} {chained}"
    );
}

// ---------------------------------------------------------------------------------------------
// Tampering

/// A commit of the recording in parts that can be changed.
#[derive(Clone)]
struct Parts<'a> {
    claim: Claim<'a>,
    root: Cid,
    blocks: Vec<Block>,
    /// Cut off so many bytes at the end.
    cut: usize,
}

impl<'a> Parts<'a> {
    fn of(frame: &'a [u8]) -> Option<Self> {
        let Claimed::Commit(claim) = claim(frame)? else { return None };
        let (roots, blocks) = read_all(claim.blocks).unwrap();
        Some(Self { claim, root: roots[0], blocks, cut: 0 })
    }

    fn block(&mut self, cid: Cid) -> &mut Block {
        self.blocks.iter_mut().find(|block| block.cid == cid).unwrap()
    }

    fn commit(&mut self) -> SignedCommit {
        let root = self.root;
        SignedCommit::read(&self.block(root).data).unwrap()
    }

    /// Replaces the commit object, and everything that refers to it.
    fn with_field(mut self, name: &str, value: Cbor<'_>) -> Self {
        let root = self.root;
        let block = self.block(root).data.clone();
        let Cbor::Map(mut fields) = decode(&block).unwrap() else { panic!() };
        fields.iter_mut().find(|(field, _)| *field == name).unwrap().1 = value;
        let data = encode_value(&Cbor::Map(fields)).unwrap();
        let cid = Cid::compute(Codec::Drisl, &data);
        *self.block(root) = Block { cid, data };
        self.root = cid;
        self.claim.commit = Some(cid);
        self
    }

    /// Judged like a frame from the relay: the content, then the signature.
    fn fault(&self, key: &Key) -> Option<Fault> {
        let car = write_all(&[self.root], &self.blocks).unwrap();
        let claim = Claim { blocks: &car[..car.len() - self.cut], ..self.claim.clone() };
        match verify::commit(&claim, NOW) {
            Ok(sound) if sound.commit.is_signed_by(key) => None,
            Ok(_) => Some(Fault::Signature),
            Err(invalid) => Some(invalid.fault),
        }
    }
}

fn flip(bytes: &mut [u8]) {
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
}

/// The other of the two values that are mathematically a signature.
fn high_s(signature: &[u8; 64]) -> [u8; 64] {
    // The order of secp256k1 (SEC 2, 2.4.1).
    const ORDER: [u8; 32] = [
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe, 0xba,
        0xae, 0xdc, 0xe6, 0xaf, 0x48, 0xa0, 0x3b, 0xbf, 0xd2, 0x5e, 0x8c, 0xd0, 0x36, 0x41, 0x41,
    ];
    let mut high = *signature;
    let mut borrow = 0;
    for at in (0..32).rev() {
        let difference = i16::from(ORDER[at]) - i16::from(signature[32 + at]) - borrow;
        borrow = i16::from(difference < 0);
        high[32 + at] = u8::try_from(difference.rem_euclid(256)).unwrap();
    }
    high
}

type Tamper = (&'static str, fn(Parts<'_>) -> Option<Parts<'_>>, &'static [Fault]);

/// What can be done to a commit, and the faults that are right answers to it. `None` where a commit has nothing of the kind.
const TAMPERINGS: &[Tamper] = &[
    (
        "a bit of a record",
        |mut parts| {
            let cid = parts.claim.ops.iter().find_map(|op| op.cid)?;
            flip(&mut parts.block(cid).data);
            Some(parts)
        },
        &[Fault::Archive],
    ),
    (
        "a bit of a tree node",
        |mut parts| {
            let data = parts.commit().data;
            flip(&mut parts.block(data).data);
            Some(parts)
        },
        &[Fault::Archive],
    ),
    (
        "a bit of the signature",
        |mut parts| {
            let mut signature = parts.commit().signature;
            flip(&mut signature);
            Some(parts.with_field("sig", Cbor::Bytes(&signature)))
        },
        &[Fault::Signature],
    ),
    (
        "the signature's other value",
        |mut parts| {
            let signature = high_s(&parts.commit().signature);
            Some(parts.with_field("sig", Cbor::Bytes(&signature)))
        },
        &[Fault::Signature],
    ),
    (
        "a signature that is too short",
        |parts| Some(parts.with_field("sig", Cbor::Bytes(&[1; 63]))),
        &[Fault::Commit],
    ),
    (
        "the archive cut off",
        |mut parts| {
            parts.cut = 1;
            Some(parts)
        },
        &[Fault::Archive],
    ),
    (
        "the root node left out",
        |mut parts| {
            // Nothing has to be undone on it.
            parts.claim.ops.first()?;
            let data = parts.commit().data;
            parts.blocks.retain(|block| block.cid != data);
            Some(parts)
        },
        &[Fault::Operations],
    ),
    (
        "a record left out",
        |mut parts| {
            let cid = parts.claim.ops.iter().find_map(|op| op.cid)?;
            parts.blocks.retain(|block| block.cid != cid);
            Some(parts)
        },
        &[Fault::Archive],
    ),
    (
        "an operation left out",
        |mut parts| {
            parts.claim.ops.pop()?;
            Some(parts)
        },
        &[Fault::Operations],
    ),
    (
        "an operation made up",
        |mut parts| {
            let cid = parts.root;
            let op = ClaimedOp {
                action: "create",
                path: "app.bsky.feed.post/3jzfcijpj2z2a",
                cid: Some(cid),
                prev: None,
            };
            parts.claim.ops.push(op);
            Some(parts)
        },
        &[Fault::Operations, Fault::Size],
    ),
    (
        "a delete made up",
        |mut parts| {
            let prev = Some(parts.root);
            let op =
                ClaimedOp { action: "delete", path: "app.bsky.feed.post/3jzfcijpj2z2a", cid: None, prev };
            parts.claim.ops.push(op);
            Some(parts)
        },
        &[Fault::Operations, Fault::Size],
    ),
    (
        "a record exchanged",
        |mut parts| {
            let cid = parts.root;
            parts.claim.ops.iter_mut().find(|op| op.cid.is_some())?.cid = Some(cid);
            Some(parts)
        },
        &[Fault::Operations],
    ),
    (
        "a path changed",
        |mut parts| {
            parts.claim.ops.first_mut()?.path = "app.bsky.feed.post/3jzfcijpj2z2a";
            Some(parts)
        },
        &[Fault::Operations],
    ),
    (
        "an operation twice",
        |mut parts| {
            let op = parts.claim.ops.first()?.clone();
            parts.claim.ops.push(op);
            Some(parts)
        },
        &[Fault::Operations, Fault::Size],
    ),
    (
        "another previous tree",
        |mut parts| {
            parts.claim.prev_data.as_mut().map(|prev| *prev = parts.root)?;
            Some(parts)
        },
        &[Fault::Operations],
    ),
    (
        "a previous tree where there is none",
        |mut parts| {
            (parts.claim.since.is_none()).then(|| parts.claim.prev_data = Some(parts.root))?;
            Some(parts)
        },
        &[Fault::Operations],
    ),
    (
        "an operation made up where no previous tree is named",
        |mut parts| {
            parts.claim.since?;
            parts.claim.prev_data = None;
            let cid = parts.claim.ops.iter().find_map(|op| op.cid);
            let path = "app.bsky.feed.post/3jzfcijpj2z2a";
            parts.claim.ops.push(ClaimedOp { action: "create", path, cid: Some(cid?), prev: None });
            Some(parts)
        },
        &[Fault::Operations, Fault::Size],
    ),
    (
        "another revision in the frame",
        |mut parts| {
            parts.claim.rev = "3jzfcijpj2z2a";
            Some(parts)
        },
        &[Fault::Commit],
    ),
    (
        "another revision everywhere",
        |mut parts| {
            parts.claim.rev = "3jzfcijpj2z2a";
            Some(parts.with_field("rev", Cbor::Text("3jzfcijpj2z2a")))
        },
        &[Fault::Signature],
    ),
    (
        "a revision in the future",
        |mut parts| {
            parts.claim.rev = "bzzzzzzzzzzzz";
            Some(parts.with_field("rev", Cbor::Text("bzzzzzzzzzzzz")))
        },
        &[Fault::Revision],
    ),
    (
        "another account in the frame",
        |mut parts| {
            parts.claim.did = "did:plc:another";
            Some(parts)
        },
        &[Fault::Commit],
    ),
    (
        "another tree",
        |parts| {
            let cid = parts.root;
            Some(parts.with_field("data", Cbor::Cid(cid)))
        },
        &[Fault::Operations],
    ),
    ("another version", |parts| Some(parts.with_field("version", Cbor::Unsigned(2))), &[Fault::Commit]),
    (
        "another commit object in the frame",
        |mut parts| {
            parts.claim.commit = Some(parts.commit().data);
            Some(parts)
        },
        &[Fault::Archive],
    ),
];

#[test]
fn every_tampering_is_found_in_every_commit() {
    let (frames, keys) = recording();
    let mut tried: BTreeMap<&str, u32> = BTreeMap::new();
    for frame in &frames {
        let Some(parts) = Parts::of(frame) else { continue };
        let key = &keys[parts.claim.did];
        assert_eq!(parts.fault(key), None, "untouched");
        for (name, tamper, faults) in TAMPERINGS {
            let Some(tampered) = tamper(parts.clone()) else { continue };
            let fault = tampered.fault(key);
            assert!(fault.is_some_and(|fault| faults.contains(&fault)), "{name}: {fault:?}");
            *tried.entry(name).or_default() += 1;
        }
        let foreign = keys.iter().find(|(did, _)| *did != parts.claim.did).unwrap().1;
        assert_eq!(parts.fault(foreign), Some(Fault::Signature));
    }
    for (name, _, _) in TAMPERINGS {
        assert!(tried.get(name).is_some_and(|times| *times > 5), "{name} was hardly tried: {tried:?}");
    }
}

#[test]
fn what_is_larger_than_allowed_is_refused() {
    let (frames, keys) = recording();
    let parts = frames.iter().find_map(|frame| Parts::of(frame)).unwrap();
    let key = &keys[parts.claim.did];
    let mut many = parts.clone();
    let op = ClaimedOp { action: "create", path: "a.b.c/d", cid: Some(many.root), prev: None };
    many.claim.ops = vec![op; 201];
    assert_eq!(many.fault(key), Some(Fault::Size));
    let mut large = parts;
    let data = vec![0; 2_000_000];
    large.blocks.push(Block { cid: Cid::compute(Codec::Raw, &data), data });
    assert_eq!(large.fault(key), Some(Fault::Size));
}

// ---------------------------------------------------------------------------------------------
// DID documents

#[test]
fn a_document_yields_the_key_in_each_of_its_forms() {
    let vectors = vectors("crypto/signature-fixtures.json");
    let did = "did:plc:example";
    for vector in vectors.iter().filter(|vector| vector["validSignature"] == true) {
        let text = |name: &str| vector[name].as_str().unwrap();
        let key = Key::from_did_key(text("publicKeyDid")).unwrap();
        let legacy = (text("didDocSuite"), text("publicKeyMultibase").to_owned());
        for (kind, value) in [legacy, ("Multikey", key.to_multikey())] {
            for id in ["#atproto", "did:plc:example#atproto"] {
                let document = serde_json::json!({
                    "@context": ["https://www.w3.org/ns/did/v1"],
                    "id": did,
                    "alsoKnownAs": ["https://elsewhere.example", "at://alice.example", "at://second.example"],
                    "verificationMethod": [
                        {"id": "#other", "type": "Multikey", "controller": did, "publicKeyMultibase": "z1"},
                        {"id": id, "type": kind, "controller": did, "publicKeyMultibase": value},
                    ],
                    "service": [
                        {"id": "#labeler", "type": "Labeler", "serviceEndpoint": {"uri": "https://l.example"}},
                        {"id": "#atproto_pds", "type": "AtprotoPersonalDataServer",
                         "serviceEndpoint": "https://pds.example"},
                    ],
                });
                let read = Document::read(did, document.to_string().as_bytes()).unwrap();
                assert_eq!(read.key.as_ref(), Some(&key), "{kind} {id}");
                assert_eq!(read.server.as_deref(), Some("https://pds.example"));
                assert_eq!(read.handle.as_deref(), Some("alice.example"));
                assert!(Document::read("did:plc:another", document.to_string().as_bytes()).is_err());
            }
        }
    }
    let bare = Document::read(did, br#"{"id":"did:plc:example"}"#).unwrap();
    assert_eq!((bare.key, bare.server, bare.handle), (None, None, None));
    assert!(Document::read(did, b"<html>").is_err());
}
