//! Verification between origin and stream: on all processors, in order.
//!
//! What is conclusively invalid is withheld; what cannot be checked yet is appended, and checked later by
//! [`super::checker`]. Every commit is also compared with the one before it, so that whatever is missing upstream is
//! noticed at its account's next commit.

use std::collections::{BTreeSet, HashMap};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::stream::FuturesOrdered;
use futures_util::{FutureExt as _, StreamExt as _};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::Arrival;
use super::append::Item;
use super::reader::End;
use super::relay::decode::{Claimed, claim};
use crate::config::VerifyMode;
use crate::crash;
use crate::directory::{Directory, LookupError};
use crate::event::{Reason, Reject};
use crate::metrics;
use crate::mutex::lock;
use crate::stream::Stream;
use crate::stream::accounts::{Repair, Unchecked};
use crate::stream::append::NewLetter;
use crate::time::now_ms;
use crate::verify::known::{Head, Known, KnownKey};
use crate::verify::{self, Fault, Invalid, Key, Sound};

/// Items that are checked together.
const CHUNK: usize = 64;
/// A key that was looked up within this time is not looked up again, however many signatures it does not fit.
const FRESH: Duration = Duration::from_mins(1);
/// How long a commit may wait for its account's key to be looked up again. Everything behind it waits, too.
const SECOND_LOOK: Duration = Duration::from_secs(2);
/// Accounts kept in memory: more than can be on their way to the stream, so that what Redis does not know yet is here.
const RECENT: usize = 32 * 1024;
/// Paths named in the dead letter of a withheld commit.
const PATHS: usize = 20;

/// What is known about accounts, the most recent ones in memory.
#[derive(Default)]
pub(super) struct Recent {
    new: HashMap<String, Known>,
    old: HashMap<String, Known>,
}

impl Recent {
    fn get(&self, did: &str) -> Option<Known> {
        self.new.get(did).or_else(|| self.old.get(did)).copied()
    }

    fn set(&mut self, did: &str, known: Known) {
        if self.new.len() >= RECENT {
            self.old = std::mem::take(&mut self.new);
        }
        self.new.insert(did.to_owned(), known);
    }

    /// Notes a key that was looked up.
    pub(super) fn set_key(&mut self, did: &str, key: Option<KnownKey>) {
        if let Some(known) = self.get(did) {
            self.set(did, Known { key, ..known });
        }
    }
}

/// A commit's outcome.
#[derive(Debug)]
enum Outcome {
    /// Content and signature hold.
    Valid(Sound),
    /// The content holds; the key is not known now.
    Unknown(Sound),
    Invalid(Invalid),
}

/// What the check of one item found.
#[derive(Debug, Default)]
struct Checked {
    outcome: Option<Outcome>,
    /// A key that was looked up on the way.
    looked_up: Option<KnownKey>,
}

/// Verifies a session's items.
pub(super) struct Verifier {
    mode: VerifyMode,
    stream: Stream,
    directory: Arc<Directory>,
    recent: Arc<Mutex<Recent>>,
}

impl Verifier {
    /// A verifier that knows nothing but what Redis does.
    pub(super) fn new(
        mode: VerifyMode,
        stream: Stream,
        directory: Arc<Directory>,
        recent: Arc<Mutex<Recent>>,
    ) -> Self {
        Self { mode, stream, directory, recent }
    }

    /// Queue -> queue, until the first is closed and empty.
    pub(super) async fn run(
        mut self,
        mut from: mpsc::Receiver<Item>,
        to: mpsc::Sender<Item>,
    ) -> Result<(), End> {
        let most = 2 * std::thread::available_parallelism().map_or(2, usize::from);
        let mut checks: FuturesOrdered<JoinHandle<Vec<(Item, Checked)>>> = FuturesOrdered::new();
        let mut open = true;
        loop {
            let mut chunk = Vec::new();
            tokio::select! {
                count = from.recv_many(&mut chunk, CHUNK), if open && checks.len() < most => {
                    open = count > 0;
                    if open {
                        let known = self.recall(&chunk).await?;
                        checks.push_back(tokio::spawn(check_all(chunk, known, Arc::clone(&self.directory))));
                    }
                }
                Some(done) = checks.next() => {
                    // A panic in there ends the session; the next one reads the frame again.
                    let done = done.map_err(|error| End::Operator(format!("verification failed: {error}")))?;
                    for (mut item, checked) in done {
                        self.settle(&mut item.arrival, checked);
                        if to.send(item).await.is_err() {
                            return Ok(());
                        }
                    }
                }
                else => return Ok(()),
            }
        }
    }

    /// The known keys of the accounts in a chunk. Afterwards all of them are in memory. What is outdated by an `#identity` is
    /// so for every later chunk, even if this one is still being checked.
    async fn recall(&mut self, chunk: &[Item]) -> Result<Keys, End> {
        let claims: Vec<Claimed<'_>> =
            chunk.iter().filter_map(|item| claim(item.arrival.frame.as_ref()?)).collect();
        let dids: BTreeSet<&str> = claims.iter().map(Claimed::did).collect();
        let unknown: Vec<&str> = {
            let recent = lock(&self.recent);
            dids.iter().copied().filter(|did| recent.get(did).is_none()).collect()
        };
        let found = self.stream.known(&unknown).await?;
        let mut recent = lock(&self.recent);
        for (did, known) in found {
            recent.set(did, known);
        }
        let key = |did: &str| recent.get(did).and_then(|known| known.key);
        let keys = dids.into_iter().filter_map(|did| Some((did.to_owned(), key(did)?))).collect();
        for claimed in claims {
            if let Claimed::Identity(did) = claimed
                && let Some(known) = recent.get(did)
            {
                recent.set(did, Known { key: known.key.map(KnownKey::outdated), ..known });
                self.directory.forget(did);
            }
        }
        Ok(keys)
    }

    /// Decides what becomes of an arrival, in the order of the relay.
    fn settle(&self, arrival: &mut Arrival, checked: Checked) {
        let Some(frame) = arrival.frame.take() else { return };
        let Some(claimed) = claim(&frame) else { return };
        let did = claimed.did();
        let mut recent = lock(&self.recent);
        let mut known = recent.get(did).unwrap_or_default();
        if checked.looked_up.is_some() {
            known.key = checked.looked_up;
        }
        match (claimed, checked.outcome) {
            (Claimed::Identity(_), _) => {
                // It is looked up again, but still tells who has not signed.
                known.key = known.key.map(KnownKey::outdated);
                self.directory.forget(did);
                want_handle(arrival, did);
            }
            (_, None) => return,
            (Claimed::Commit(claim) | Claimed::Sync(claim), Some(Outcome::Invalid(invalid))) => {
                self.withhold(arrival, &claim, &invalid);
            }
            (Claimed::Commit(claim), Some(Outcome::Valid(sound))) => {
                metrics::verified(if sound.inverted { "valid" } else { "no_previous_tree" });
                if follow(arrival, &claim, &sound, &mut known, true) && sound.inverted {
                    arrival.accounts.unchecked.push((did.to_owned(), None));
                }
            }
            (Claimed::Commit(claim), Some(Outcome::Unknown(sound))) => {
                if known == Known::default() {
                    want_handle(arrival, did);
                }
                metrics::verified("unchecked");
                if follow(arrival, &claim, &sound, &mut known, false) {
                    check_later(arrival, did, &sound);
                }
            }
            (Claimed::Sync(_), Some(Outcome::Valid(sound))) => {
                metrics::verified("valid");
                if replace(arrival, did, &sound, &mut known, true) {
                    arrival.accounts.unchecked.push((did.to_owned(), None));
                }
            }
            (Claimed::Sync(_), Some(Outcome::Unknown(sound))) => {
                metrics::verified("unchecked");
                if replace(arrival, did, &sound, &mut known, false) {
                    check_later(arrival, did, &sound);
                }
            }
        }
        recent.set(did, known);
        arrival.accounts.known.push((did.to_owned(), known));
    }

    /// An invalid commit: its entries are left out, and a dead letter says so.
    fn withhold(&self, arrival: &mut Arrival, claim: &verify::Claim<'_>, invalid: &Invalid) {
        metrics::verified(invalid.fault.name());
        if self.mode == VerifyMode::Log {
            return;
        }
        *arrival.missed.entry("withheld").or_default() += 1;
        let did = claim.did.to_owned();
        // Its revision is not proven either: any repository that the account has signed will do.
        request(arrival, claim.did, "", invalid.fault.name());
        if arrival.entries.is_empty() && arrival.letters.is_empty() {
            // None of it is wanted here.
            return;
        }
        arrival.entries.clear();
        arrival.letters.clear();
        let paths: Vec<&str> = claim.ops.iter().take(PATHS).map(|op| op.path).collect();
        arrival.letters.push(NewLetter {
            key: format!("{did} {} withheld", claim.rev),
            event_type: "commit",
            seq: arrival.position,
            reject: Reject::new(Reason::Unproven, format!("{}: {}", invalid.fault.name(), invalid.message)),
            op: json!({ "action": "withheld", "path": paths.first(), "paths": paths }).to_string(),
            data: json!({ "repo": did, "rev": claim.rev }).to_string(),
            account: did,
        });
    }
}

/// Its signature is checked when the account's key is known.
fn check_later(arrival: &mut Arrival, did: &str, sound: &Sound) {
    let unchecked = Unchecked {
        hash: sound.commit.hash,
        signature: sound.commit.signature,
        rev: Head::new(&sound.commit.rev, &sound.commit.data).rev,
    };
    arrival.accounts.unchecked.push((did.to_owned(), Some(unchecked)));
}

/// The commit becomes its account's head, unless it is a repeat. If it does not follow the head before it, commits are
/// missing.
fn follow(
    arrival: &mut Arrival,
    claim: &verify::Claim<'_>,
    sound: &Sound,
    known: &mut Known,
    proven: bool,
) -> bool {
    let new = Head::new(&sound.commit.rev, &sound.commit.data);
    if let Some(head) = known.head {
        if new.rev <= head.rev {
            return false;
        }
        if !head.is_followed_by(claim.since, claim.prev_data.as_ref()) {
            *arrival.missed.entry("broken_chain").or_default() += 1;
            request(arrival, claim.did, if proven { claim.rev } else { "" }, "chain");
        }
    }
    known.head = Some(new);
    true
}

/// The account's server says what its repository is now, unless it is a repeat. If it is not what we have, something is
/// missing.
fn replace(arrival: &mut Arrival, did: &str, sound: &Sound, known: &mut Known, proven: bool) -> bool {
    let new = Head::new(&sound.commit.rev, &sound.commit.data);
    if let Some(head) = known.head {
        if new.rev <= head.rev {
            return false;
        }
        if new.data != head.data {
            request(arrival, did, if proven { &sound.commit.rev } else { "" }, "sync");
        }
    }
    known.head = Some(new);
    true
}

fn request(arrival: &mut Arrival, did: &str, rev: &str, reason: &'static str) {
    metrics::repair_requested(reason);
    let repair = Repair { reason: reason.to_owned(), rev: rev.to_owned(), at: now_ms() };
    arrival.accounts.repairs.push((did.to_owned(), repair));
}

/// The account's handle is to be looked up.
fn want_handle(arrival: &mut Arrival, did: &str) {
    arrival.accounts.handles.push((did.to_owned(), arrival.position));
}

/// The keys of a chunk's accounts.
type Keys = HashMap<String, KnownKey>;

async fn check_all(items: Vec<Item>, mut keys: Keys, directory: Arc<Directory>) -> Vec<(Item, Checked)> {
    let mut done = Vec::with_capacity(items.len());
    for item in items {
        let checked = match item.arrival.frame.as_ref().and_then(|frame| claim(frame)) {
            Some(claimed) => {
                let check = AssertUnwindSafe(check(&claimed, &mut keys, &directory)).catch_unwind();
                // What makes us panic proves nothing, and holds up nothing.
                check.await.unwrap_or_else(|_| {
                    let invalid = Invalid::new(Fault::Commit, "its verification made the program panic");
                    Checked { outcome: Some(Outcome::Invalid(invalid)), looked_up: None }
                })
            }
            None => Checked::default(),
        };
        done.push((item, checked));
        tokio::task::yield_now().await;
    }
    done
}

async fn check(claimed: &Claimed<'_>, keys: &mut Keys, directory: &Directory) -> Checked {
    crash::panic_over("verify", claimed.did());
    let sound = match claimed {
        Claimed::Identity(did) => {
            if let Some(key) = keys.get_mut(*did) {
                *key = key.outdated();
            }
            return Checked::default();
        }
        Claimed::Commit(claim) => verify::commit(claim, now_ms()),
        Claimed::Sync(claim) => verify::sync(claim, now_ms()),
    };
    let sound = match sound {
        Ok(sound) => sound,
        Err(invalid) => return Checked { outcome: Some(Outcome::Invalid(invalid)), looked_up: None },
    };
    let did = claimed.did();
    let Some(known) = keys.get(did).copied() else {
        return Checked { outcome: Some(Outcome::Unknown(sound)), looked_up: None };
    };
    if known.key().is_some_and(|key| sound.commit.is_signed_by(&key)) {
        // After its document has changed, the key may be another one now: checked again later.
        let outcome = if known.looked_up == 0 { Outcome::Unknown(sound) } else { Outcome::Valid(sound) };
        return Checked { outcome: Some(outcome), looked_up: None };
    }
    let fresh = now_ms() / 1000 <= u64::from(known.looked_up) + FRESH.as_secs();
    if fresh {
        return Checked { outcome: Some(Outcome::Invalid(foreign(&sound))), looked_up: None };
    }
    // The account may have a new key, and not have said so.
    let look = tokio::time::timeout(SECOND_LOOK, directory.document(did)).await;
    let key: Option<Key> = match look {
        Ok(Ok(document)) => document.key,
        Ok(Err(LookupError::None(_))) => None,
        // Not the key that we know, and we cannot ask for another one: withheld. A repair follows when we can.
        Ok(Err(LookupError::Away(_))) | Err(_) => {
            return Checked { outcome: Some(Outcome::Invalid(foreign(&sound))), looked_up: None };
        }
    };
    let looked_up = key.as_ref().map(|key| KnownKey::new(key, now_ms()));
    if let Some(known) = looked_up {
        keys.insert(did.to_owned(), known);
    }
    let outcome = match key {
        Some(key) if sound.commit.is_signed_by(&key) => Outcome::Valid(sound),
        _ => Outcome::Invalid(foreign(&sound)),
    };
    Checked { outcome: Some(outcome), looked_up }
}

fn foreign(sound: &Sound) -> Invalid {
    let message = format!("the signature of revision {} is not that of the account's key", sound.commit.rev);
    Invalid::new(Fault::Signature, message)
}
