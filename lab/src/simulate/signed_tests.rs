//! A network that signs, seen with the eyes of a consumer that verifies.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use shrike::cbor::Cid;
use standpipe::config::{self, Config, Role};
use standpipe::directory::Directory;
use standpipe::directory::repository::FetchError;
use standpipe::origin::relay::decode::{Claimed, claim};
use standpipe::verify::{self, Fault, Key, Repository, Sound};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::accounts::Accounts;
use super::key::Published;
use super::*;

/// The time of the network's last event is long before.
const NOW: u64 = 1_800_000_000_000;

fn options(events: u64) -> NetworkOptions {
    NetworkOptions {
        seed: 7,
        accounts: 60,
        events,
        deletions: true,
        signed: true,
        ..NetworkOptions::default()
    }
}

/// What a frame's commit says, if it holds, and the head that it continues.
type Judged<'a> = Result<(Sound, Option<(Option<&'a str>, Option<Cid>)>), verify::Invalid>;

fn judge(frame: &[u8]) -> Option<Judged<'_>> {
    match claim(frame)? {
        Claimed::Commit(claim) => {
            Some(verify::commit(&claim, NOW).map(|sound| (sound, Some((claim.since, claim.prev_data)))))
        }
        Claimed::Sync(claim) => Some(verify::sync(&claim, NOW).map(|sound| (sound, None))),
        Claimed::Identity(_) => None,
    }
}

struct Served {
    directory: Directory,
    url: String,
    counters: Arc<Counters>,
    _stop: tokio_util::sync::DropGuard,
}

impl Served {
    async fn start(network: &NetworkOptions) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let counters = Arc::new(Counters::default());
        let stop = CancellationToken::new();
        let relay = RelayOptions { source: Source::Network(network.clone()), rate: None, oldest: 0 };
        tokio::spawn(serve(listener, relay, Arc::clone(&counters), stop.clone()));
        _ = rustls::crypto::ring::default_provider().install_default();
        let variables = [("PLC_URL", url.as_str()), ("ALLOW_PRIVATE_ADDRESSES", "true")];
        let variables = variables.map(|(name, value)| (OsString::from(name), OsString::from(value)));
        let (config, _): (Config, _) = config::from_env(variables, Role::Tool).unwrap();
        Self { directory: Directory::new(&config).unwrap(), url, counters, _stop: stop.drop_guard() }
    }

    async fn get(&self, path: &str) -> serde_json::Value {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let host = self.url.strip_prefix("http://").unwrap();
        let mut stream = tokio::net::TcpStream::connect(host).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
    }
}

#[test]
fn a_network_that_signs_is_the_same_every_time() {
    let all: Vec<Frame> = Network::new(&options(2000)).collect();
    let numbers: Vec<u64> = sequence_numbers(&options(2000)).collect();
    assert_eq!(all.iter().map(|frame| frame.seq.unwrap()).collect::<Vec<_>>(), numbers);
    for cursor in [1, 777, 1500, *numbers.last().unwrap()] {
        let mut network = Network::new(&options(2000));
        assert!(network.seek(cursor));
        let from = all.iter().position(|frame| frame.seq >= Some(cursor)).unwrap();
        assert!(network.collect::<Vec<_>>() == all[from..], "cursor {cursor}");
    }
}

/// Archives, operations, chains and signatures, also across changes of keys.
#[test]
fn every_commit_holds_and_continues_the_one_before() {
    let options = options(6000);
    let published = Arc::new(Published::default());
    let accounts = Accounts::new(options.seed);
    let numbers: HashMap<String, u32> = (0..60).map(|number| (accounts.did(number), number)).collect();
    let mut heads: HashMap<String, (String, Cid)> = HashMap::new();
    let (mut changed, mut chained) = (BTreeSet::new(), 0);
    for frame in Network::new(&options).publishing(Arc::clone(&published)) {
        let Some(judged) = judge(&frame.bytes) else { continue };
        let (sound, before) = judged.unwrap();
        let did = sound.commit.did.clone();
        if let Some((since, prev_data)) = before {
            assert!(sound.inverted || since.is_none());
            let head = heads.get(&did);
            assert_eq!((since, prev_data), (head.map(|head| head.0.as_str()), head.map(|head| head.1)));
            chained += u32::from(head.is_some());
        }
        let number = numbers[&did];
        let changes = published.changes(number);
        let key =
            Key::from_did_key(&format!("did:key:{}", key::Key::of(options.seed, number, changes).multikey()));
        assert!(sound.commit.is_signed_by(&key.unwrap()), "{did} at {:?}", frame.seq);
        if changes > 0 {
            changed.insert(number);
        }
        heads.insert(did, (sound.commit.rev, sound.commit.data));
    }
    assert!(chained > 3000, "{chained}");
    assert!(changed.len() >= 2, "{} accounts changed their key", changed.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_shows_each_repository_as_its_last_commit_left_it() {
    let options = options(4000);
    let served = Served::start(&options).await;
    let mut heads: BTreeMap<String, (String, Cid)> = BTreeMap::new();
    let mut inactive = BTreeSet::new();
    for frame in Network::new(&options) {
        let (kind, body) = tests::parts(&frame.bytes);
        if kind == "#account" {
            let did = tests::text(&body["did"]).to_owned();
            match tests::text(body.get("status").unwrap_or(&shrike::cbor::Value::Text(""))) {
                "" | "throttled" | "desynchronized" => _ = inactive.remove(&did),
                _ => _ = inactive.insert(did),
            }
        }
        if let Some(Ok((sound, _))) = judge(&frame.bytes) {
            heads.insert(sound.commit.did, (sound.commit.rev, sound.commit.data));
        }
    }
    assert!(!inactive.is_empty());
    // Nothing was sent yet, so there is nothing.
    let first = heads.keys().next().unwrap();
    assert!(matches!(served.directory.repository(first, &served.url, true).await, Err(FetchError::Gone(_))));
    served.counters.last_seq_sent.store(u64::MAX - 1, Ordering::Relaxed);
    let status = served.get(&format!("/xrpc/com.atproto.sync.getRepoStatus?did={first}")).await;
    assert_eq!(status["rev"].as_str(), Some(heads[first].0.as_str()));
    let mut moved = 0;
    for (did, (rev, data)) in &heads {
        let document = served.directory.document(did).await.unwrap();
        let server = document.server.unwrap();
        if server != served.url {
            moved += 1;
            let left = served.directory.repository(did, &served.url, true).await;
            assert!(matches!(left, Err(FetchError::Gone(reason)) if reason.contains("RepoDeactivated")));
        }
        match served.directory.repository(did, &server, true).await {
            Ok(archive) => {
                assert!(!inactive.contains(did), "{did}");
                let repository = Repository::read(&archive, did, &document.key.unwrap()).unwrap();
                assert_eq!((&repository.commit.rev, &repository.commit.data), (rev, data));
            }
            Err(FetchError::Gone(_)) => assert!(inactive.contains(did), "{did}"),
            Err(other) => panic!("{did}: {other:?}"),
        }
    }
    assert!(moved > 0, "nobody has moved");
    let mut listed = BTreeMap::new();
    let mut cursor = "0".to_owned();
    loop {
        let page = served.get(&format!("/xrpc/com.atproto.sync.listRepos?limit=25&cursor={cursor}")).await;
        for repo in page["repos"].as_array().unwrap() {
            let text = |name: &str| repo[name].as_str().unwrap().to_owned();
            listed.insert(text("did"), text("rev"));
        }
        match page["cursor"].as_str() {
            Some(next) => next.clone_into(&mut cursor),
            None => break,
        }
    }
    let wanted: BTreeMap<String, String> =
        heads.iter().map(|(did, (rev, _))| (did.clone(), rev.clone())).collect();
    let deleted = wanted.keys().filter(|did| !listed.contains_key(*did)).count();
    assert!(deleted > 0 && wanted.iter().all(|(did, rev)| listed.get(did).is_none_or(|l| l == rev)));
}

/// What is wrong is found; what is not, holds; and the last word about each account is true.
#[test]
fn every_lie_is_told_and_each_account_ends_with_the_truth() {
    let honest = options(8000);
    let lying = NetworkOptions { lies: 6, ..honest.clone() };
    let truth: HashMap<Option<u64>, Frame> = Network::new(&honest).map(|frame| (frame.seq, frame)).collect();
    let mut faults: BTreeMap<Option<Fault>, u32> = BTreeMap::new();
    let mut last: HashMap<String, bool> = HashMap::new();
    let mut sent = 0;
    for frame in Network::new(&lying) {
        sent += 1;
        let is_true = truth[&frame.seq].bytes == frame.bytes;
        let (kind, body) = tests::parts(&frame.bytes);
        if kind == "#commit" {
            last.insert(tests::text(&body["repo"]).to_owned(), is_true);
        }
        if !is_true {
            let fault = judge(&frame.bytes).unwrap().err().map(|invalid| invalid.fault);
            *faults.entry(fault).or_default() += 1;
        }
    }
    let dropped = truth.len() - sent;
    println!("{dropped} dropped, {faults:?}");
    assert!(dropped > 200);
    for fault in [Fault::Archive, Fault::Operations] {
        assert!(faults[&Some(fault)] > 20, "{fault:?}");
    }
    // Those that only a key or a head shows: signature, signer, since.
    assert!(faults[&None] > 50);
    assert!(last.values().all(|is_true| *is_true));
}

/// What was not sent comes in the end, as it would have come in its place.
#[test]
fn what_was_dropped_can_come_late() {
    let honest = options(4000);
    let drops = NetworkOptions { drops: 5, ..honest.clone() };
    // All that follows the number is the same.
    let content = |frame: &Frame| {
        let (kind, mut body) = tests::parts(&frame.bytes);
        body.remove("seq");
        format!("{kind} {body:?}")
    };
    let told: Vec<Frame> = Network::new(&drops).collect();
    let told_content: BTreeSet<String> = told.iter().map(content).collect();
    let missing: Vec<String> = Network::new(&honest)
        .map(|frame| content(&frame))
        .filter(|content| !told_content.contains(content))
        .collect();
    assert!(missing.len() > 500, "{}", missing.len());
    let late = NetworkOptions { late: Late::Everything, ..drops.clone() };
    let after: Vec<Frame> = Network::new(&late).skip(told.len()).collect();
    assert_eq!(after.iter().map(content).collect::<Vec<_>>(), missing);
    assert!(after.is_sorted_by(|one, other| one.seq < other.seq) && after[0].seq > told.last().unwrap().seq);
    let mut resumed = Network::new(&late);
    assert!(resumed.seek(after[77].seq.unwrap()));
    assert!(resumed.collect::<Vec<_>>() == after[77..]);
    let creates = NetworkOptions { late: Late::Creates, ..drops };
    let creates: Vec<String> = Network::new(&creates).skip(told.len()).map(|frame| content(&frame)).collect();
    assert!(creates.len() > 300 && creates.len() < missing.len(), "{}", creates.len());
    assert!(creates.iter().all(|content| missing.contains(content) && !content.contains("\"delete\"")));
}
