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
use shrike::cbor::Cid;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::Arrival;
use super::append::Item;
use super::reader::End;
use super::recent::Recent;
use super::relay::decode::{Claimed, claim};
use crate::config::VerifyMode;
use crate::crash;
use crate::directory::{Directory, LookupError};
use crate::event::{Reason, Reject};
use crate::metrics;
use crate::mutex::lock;
use crate::stream::Stream;
use crate::stream::accounts::{Repair, Unchecked};
use crate::stream::append::{Cursor, NewLetter};
use crate::time::now_ms;
use crate::verify::known::{Generation, Head, Known, KnownKey, Step};
use crate::verify::{self, Fault, Invalid, Key, SignedCommit, Sound};

/// Items that are checked together.
const CHUNK: usize = 64;
/// A key that was looked up within this time is not looked up again, however many signatures it does not fit.
const FRESH: Duration = Duration::from_mins(1);
/// How long a commit may wait for its account's key to be looked up again. Everything behind it waits, too.
const SECOND_LOOK: Duration = Duration::from_secs(2);
/// Paths named in the dead letter of a withheld commit.
const PATHS: usize = 20;

/// A commit's outcome.
#[derive(Debug)]
enum Outcome {
    /// The content holds, and with `proven` the signature does. Without, the key is not known now.
    Sound {
        sound: Sound,
        proven: bool,
    },
    Invalid(Invalid),
}

/// What the check of one frame found.
#[derive(Debug)]
struct Checked {
    did: String,
    finding: Finding,
    /// A key that was looked up on the way.
    looked_up: Option<KnownKey>,
}

/// An item with what its check found; nothing if there is nothing to check.
type CheckedItem = (Item, Option<Checked>);

/// What a frame turned out to be.
#[derive(Debug)]
enum Finding {
    /// A `#commit`, and the commit that it claims to follow.
    Commit(Outcome, Link),
    /// A `#sync`.
    Sync(Outcome),
    /// An `#identity`.
    Identity,
}

/// The commit that another one claims to follow.
#[derive(Debug)]
struct Link {
    since: Option<String>,
    prev_data: Option<Cid>,
}

/// Verifies a session's items.
pub(super) struct Verifier {
    mode: VerifyMode,
    stream: Stream,
    directory: Arc<Directory>,
    recent: Arc<Mutex<Recent>>,
    generation: Generation,
    /// Up to here, everything was appended before.
    high: Option<i64>,
}

impl Verifier {
    /// A verifier that knows nothing but what Redis does.
    pub(super) fn new(
        mode: VerifyMode,
        stream: Stream,
        directory: Arc<Directory>,
        recent: Arc<Mutex<Recent>>,
        cursor: &Cursor,
    ) -> Self {
        Self { mode, stream, directory, recent, generation: cursor.generation, high: cursor.high }
    }

    /// Queue -> queue, until the first is closed and empty.
    pub(super) async fn run(
        mut self,
        mut from: mpsc::Receiver<Item>,
        to: mpsc::Sender<Item>,
    ) -> Result<(), End> {
        let most = 2 * std::thread::available_parallelism().map_or(2, usize::from);
        let mut checks: FuturesOrdered<JoinHandle<Vec<CheckedItem>>> = FuturesOrdered::new();
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
            // A repair notes the head of an account that has none.
            dids.iter()
                .copied()
                .filter(|did| recent.get(did).is_none_or(|known| known.head.is_none()))
                .collect()
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
    fn settle(&mut self, arrival: &mut Arrival, checked: Option<Checked>) {
        if let Some(gap) = arrival.gap.as_ref().filter(|gap| gap.is_wide()) {
            // It had been read once, and was to be read again: the heads know of more than the tables.
            let lossy = gap.after.zip(self.high).is_some_and(|(after, high)| after < high);
            self.generation = self.generation.next(lossy);
            arrival.accounts.generation = Some(self.generation);
        }
        let frame = arrival.frame.take();
        let Some(Checked { did, finding, looked_up }) = checked else { return };
        let mut recent = lock(&self.recent);
        let mut known = recent.get(&did).unwrap_or_default();
        // A repair may have noted its head, but not its key.
        let is_new = known.key.is_none();
        known.key = looked_up.or(known.key);
        match finding {
            Finding::Identity => {
                // It is looked up again, but still tells who has not signed.
                known.key = known.key.map(KnownKey::outdated);
                self.directory.forget(&did);
                want_handle(arrival, &did);
            }
            Finding::Commit(Outcome::Invalid(invalid), _) | Finding::Sync(Outcome::Invalid(invalid)) => {
                let claimed = frame.as_ref().and_then(|frame| claim(frame));
                if let Some(Claimed::Commit(claim) | Claimed::Sync(claim)) = claimed {
                    self.withhold(arrival, &claim, &invalid);
                }
            }
            Finding::Commit(Outcome::Sound { sound, proven }, link) => {
                if is_new {
                    want_handle(arrival, &did);
                }
                let follows =
                    |head: &Head| head.is_followed_by(link.since.as_deref(), link.prev_data.as_ref());
                let step = known.advance(head_of(&sound), self.generation, follows);
                if step == Step::Missing {
                    *arrival.missed.entry("broken_chain").or_default() += 1;
                }
                note(arrival, &did, &sound, proven, step, "chain");
            }
            Finding::Sync(Outcome::Sound { sound, proven }) => {
                let new = head_of(&sound);
                let step = known.advance(new, self.generation, |head| head.data == new.data);
                note(arrival, &did, &sound, proven, step, "sync");
            }
        }
        recent.set(&did, known);
        arrival.accounts.known.push((did, known));
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

fn head_of(sound: &Sound) -> Head {
    Head::new(&sound.commit.rev, &sound.commit.data)
}

/// Notes a sound commit: whether its signature is still to be checked, and the repair that it asks for, if it does not
/// continue what we have.
fn note(arrival: &mut Arrival, did: &str, sound: &Sound, proven: bool, step: Step, reason: &'static str) {
    metrics::verified(match (proven, sound.inverted) {
        (false, _) => "unchecked",
        (true, true) => "valid",
        (true, false) => "no_previous_tree",
    });
    let reason = match step {
        Step::Missing => Some(reason),
        Step::AfterGap => Some("gap"),
        Step::Repeat | Step::Next => None,
    };
    if let Some(reason) = reason {
        // A revision that is not proven must not be what a repair waits for.
        request(arrival, did, if proven { &sound.commit.rev } else { "" }, reason);
    }
    let SignedCommit { hash, signature, .. } = sound.commit;
    let unchecked = match (step, proven) {
        (Step::Repeat, _) => return,
        (_, false) => Some(Unchecked { hash, signature }),
        // By the chain, it proves those before it.
        (_, true) if sound.inverted => None,
        (_, true) => return,
    };
    arrival.accounts.unchecked.push((did.to_owned(), unchecked));
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

async fn check_all(items: Vec<Item>, mut keys: Keys, directory: Arc<Directory>) -> Vec<CheckedItem> {
    let mut done = Vec::with_capacity(items.len());
    for item in items {
        let checked = match item.arrival.frame.as_ref().and_then(|frame| claim(frame)) {
            Some(claimed) => Some(check(claimed, &mut keys, &directory).await),
            None => None,
        };
        done.push((item, checked));
        tokio::task::yield_now().await;
    }
    done
}

async fn check(claimed: Claimed<'_>, keys: &mut Keys, directory: &Directory) -> Checked {
    let did = claimed.did().to_owned();
    let (claim, is_commit) = match claimed {
        Claimed::Identity(_) => {
            if let Some(key) = keys.get_mut(&did) {
                *key = key.outdated();
            }
            return Checked { did, finding: Finding::Identity, looked_up: None };
        }
        Claimed::Commit(claim) => (claim, true),
        Claimed::Sync(claim) => (claim, false),
    };
    let judged = AssertUnwindSafe(judge(&claim, is_commit, keys, directory)).catch_unwind().await;
    let (outcome, looked_up) = judged.unwrap_or_else(|_| {
        // What makes us panic proves nothing, and holds up nothing.
        let invalid = Invalid::new(Fault::Commit, "its verification made the program panic");
        (Outcome::Invalid(invalid), None)
    });
    let finding = if is_commit {
        let link = Link { since: claim.since.map(str::to_owned), prev_data: claim.prev_data };
        Finding::Commit(outcome, link)
    } else {
        Finding::Sync(outcome)
    };
    Checked { did, finding, looked_up }
}

/// Judges a commit or `#sync`. Also returns the account's key, if it was looked up on the way.
async fn judge(
    claim: &verify::Claim<'_>,
    is_commit: bool,
    keys: &mut Keys,
    directory: &Directory,
) -> (Outcome, Option<KnownKey>) {
    crash::panic_over("verify", claim.did);
    let content = if is_commit { verify::commit(claim, now_ms()) } else { verify::sync(claim, now_ms()) };
    let sound = match content {
        Ok(sound) => sound,
        Err(invalid) => return (Outcome::Invalid(invalid), None),
    };
    let Some(known) = keys.get(claim.did).copied() else {
        return (Outcome::Sound { sound, proven: false }, None);
    };
    if known.key().is_some_and(|key| sound.commit.is_signed_by(&key)) {
        // After its document has changed, the key may be another one now: checked again later.
        let proven = !known.is_outdated();
        return (Outcome::Sound { sound, proven }, None);
    }
    let fresh = now_ms() / 1000 <= u64::from(known.looked_up) + FRESH.as_secs();
    if fresh {
        return (Outcome::Invalid(foreign(&sound)), None);
    }
    // The account may have a new key, and not have said so.
    let key: Option<Key> = match directory.document_within(claim.did, SECOND_LOOK).await {
        Ok(document) => document.key,
        // Not the key that we know, and no other one to be had: withheld, and repaired when there is.
        Err(LookupError::None(_) | LookupError::Away(_)) => None,
    };
    let Some(key) = key else { return (Outcome::Invalid(foreign(&sound)), None) };
    let looked_up = KnownKey::new(&key, now_ms());
    keys.insert(claim.did.to_owned(), looked_up);
    let outcome = if sound.commit.is_signed_by(&key) {
        Outcome::Sound { sound, proven: true }
    } else {
        Outcome::Invalid(foreign(&sound))
    };
    (outcome, Some(looked_up))
}

fn foreign(sound: &Sound) -> Invalid {
    let message = format!("the signature of revision {} is not that of the account's key", sound.commit.rev);
    Invalid::new(Fault::Signature, message)
}
