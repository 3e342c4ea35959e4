//! Repairing a repository: fetches all of it from the account's server, verifies it, compares it with the account's rows,
//! and appends the difference to the stream as ordinary entries, so that it takes the way of all others.
//!
//! The entries carry the repository's revision. Whatever arrives before, during or after the repair is older or newer than
//! that, and the registers decide: nothing has to be held back.
//!
//! What a backfill queued is applied here instead.
//!
//! - `difference`: the operations that turn the rows into the repository
//! - `fetch`: fetching a repository, so that slow servers do not hold up the others
//! - `here`: applying them without the stream
//! - `verify`: comparing only

mod difference;
mod fetch;
mod here;
mod verify;

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use tracing::{debug, error, info, warn};

use crate::config::{Config, WantedDids};
use crate::crash::{self, Point};
use crate::directory::{Directory, repository};
use crate::event::EntryId;
use crate::metrics;
use crate::mutex::lock;
use crate::origin::relay::decode::entries_of;
use crate::store::repos::{self, Finished, Postponed, Queued};
use crate::store::{Session, Store, StoreError};
use crate::stream::{Redis, Stream, StreamError};
use crate::time::now_ms;
use crate::verify::known::{Generation, Head};
use crate::verify::{Repository, check_rev};
use difference::Difference;
use fetch::{Fetched, Slots};
pub use verify::Verdict;

/// The pause after the first failure; doubled by each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_hours(1);
/// After so many failures, a repository is given up until something new is wrong with it.
const ATTEMPTS: u32 = 20;
/// Up to so many rows are deleted without a second look.
const FEW: usize = 20;
/// Entries, in bytes, that are appended at a time.
const APPEND_BYTES: usize = 512 * 1024;
/// How long to wait for room in the stream before looking again.
const ROOM: Duration = Duration::from_millis(500);
/// How long the pipelines have for what was appended.
const APPLIED: Duration = Duration::from_mins(1);
/// How often to look whether they have applied it.
const LOOK: Duration = Duration::from_millis(100);
/// After this time, and then after twice as long each time, the rows are compared meanwhile.
const COMPARE: Duration = Duration::from_secs(1);
/// At least so long does a repository wait whose domain has sent much lately.
const OVER_BUDGET_PAUSE: Duration = Duration::from_secs(10);
/// How often to report what was done.
const REPORT: Duration = Duration::from_secs(10);
/// While the pipelines are so far behind, nothing is repaired: the rows say little yet.
const BEHIND_SECONDS: f64 = 30.0;

/// Repairs repositories.
pub struct Repairer {
    config: Arc<Config>,
    redis: Redis,
    store: Store,
    directory: Directory,
    slots: Slots,
    done: Mutex<Done>,
}

/// What was done since it was last reported.
#[derive(Default)]
struct Done {
    reported: Option<Instant>,
    repositories: u64,
    healed: u64,
    deleted: u64,
}

impl Done {
    /// Reports at most every ten seconds.
    fn count(&mut self, finished: &Finished) {
        self.repositories += 1;
        self.healed += finished.healed;
        self.deleted += finished.deleted;
        if self.reported.is_none_or(|reported| reported.elapsed() >= REPORT) {
            let Self { repositories, healed, deleted, .. } = *self;
            info!(repositories, healed, deleted, "repositories compared with their accounts' servers");
            *self = Self { reported: Some(Instant::now()), ..Self::default() };
        }
    }
}

/// Why a repair ended without a result.
#[derive(Debug, thiserror::Error)]
pub enum RepairError {
    /// PostgreSQL cannot be reached, or refuses.
    #[error("PostgreSQL: {0}")]
    Store(#[from] StoreError),
    /// Redis cannot be reached, or refuses.
    #[error("Redis: {0}")]
    Redis(#[from] StreamError),
}

/// Where the reader was: the id of the last entry, and the number of the last event.
type Place = (EntryId, String);

/// How things were before a repository was fetched.
struct Since {
    place: Place,
    generation: Generation,
    head: Option<Head>,
}

/// What came of a repair.
enum Outcome {
    Finished(Finished),
    Postponed(Postponed),
}

impl Outcome {
    /// It failed; the pause grows with the number of failures.
    fn failed(host: Option<String>, message: impl Into<String>) -> Self {
        let message = message.into();
        Self::Postponed(Postponed { host, message, tried: true, ..Postponed::default() })
    }
}

impl Repairer {
    /// A repairer.
    ///
    /// # Errors
    ///
    /// There is no authority for https:// to trust.
    pub fn new(config: Arc<Config>, redis: Redis, store: Store) -> anyhow::Result<Self> {
        let directory = Directory::new(&config)?;
        let slots = Slots::new(config.repair_concurrency);
        Ok(Self { slots, config, redis, store, directory, done: Mutex::default() })
    }

    /// Repairs the next repository in the queue; `false` if there is none whose turn it is, or if the others are likely to have
    /// to wait, too.
    ///
    /// # Errors
    ///
    /// A server of ours cannot be reached: the repository stays queued.
    pub async fn next(&self) -> Result<bool, RepairError> {
        let session = self.store.session().await?;
        let queued = match session.take_repo().await {
            Ok(Some(queued)) => queued,
            Ok(None) => return Ok(false),
            Err(error) => {
                // It may hold a repository.
                session.discard();
                return Err(error.into());
            }
        };
        match self.is_behind().await {
            Ok(false) => {}
            Ok(true) => {
                session.release_repo(&queued.did).await?;
                return Ok(false);
            }
            Err(error) => {
                session.discard();
                return Err(error.into());
            }
        }
        match AssertUnwindSafe(self.repair(&session, &queued)).catch_unwind().await {
            Ok(Ok(go_on)) => {
                session.release_repo(&queued.did).await?;
                return Ok(go_on);
            }
            Ok(Err(error)) => {
                // The connection's end also gives the repository back.
                session.discard();
                return Err(error);
            }
            Err(_) => {
                error!(did = queued.did, "a repair made the program panic: it is tried again in an hour");
                let message = "it made the program panic: see the log".to_owned();
                let later = Postponed { pause: LONGEST_PAUSE, message, tried: true, ..Postponed::default() };
                session.postpone_repo(&queued.did, &later).await?;
            }
        }
        session.release_repo(&queued.did).await?;
        Ok(true)
    }

    async fn is_behind(&self) -> Result<bool, StreamError> {
        let look = self.redis.connect().await?.look().await?;
        Ok(look.oldest_seconds().is_some_and(|seconds| seconds > BEHIND_SECONDS))
    }

    async fn repair(&self, session: &Session, queued: &Queued) -> Result<bool, RepairError> {
        let did = &queued.did;
        let mut go_on = true;
        match Box::pin(self.attempt(session, queued)).await? {
            Outcome::Finished(finished) => {
                session.finish_repo(queued, &finished).await?;
                metrics::repaired(finished.state);
                lock(&self.done).count(&finished);
                let Finished { state, records, healed, deleted, refused, host, .. } = &finished;
                debug!(
                    did,
                    reason = queued.reason,
                    host,
                    state,
                    records,
                    healed,
                    deleted,
                    refused,
                    "repository repaired"
                );
            }
            Outcome::Postponed(postponed) if postponed.tried && queued.attempts + 1 >= ATTEMPTS => {
                let message = format!("given up after {ATTEMPTS} attempts: {}", postponed.message);
                warn!(did, reason = queued.reason, message, "a repository cannot be repaired");
                let given_up = Finished {
                    state: "error",
                    host: postponed.host,
                    message: Some(message),
                    ..Finished::default()
                };
                session.finish_repo(queued, &given_up).await?;
                metrics::repaired("error");
            }
            Outcome::Postponed(mut postponed) => {
                go_on = !postponed.others_too;
                if postponed.tried {
                    let pause = FIRST_PAUSE.saturating_mul(1 << queued.attempts.min(12)).min(LONGEST_PAUSE);
                    postponed.pause = postponed.pause.max(pause);
                    metrics::repaired("postponed");
                }
                postponed.pause = postponed.pause.mul_f64(1.0 + fastrand::f64() / 10.0);
                debug!(did, reason = queued.reason, ?postponed, "a repair has to wait");
                session.postpone_repo(did, &postponed).await?;
            }
        }
        Ok(go_on)
    }

    async fn attempt(&self, session: &Session, queued: &Queued) -> Result<Outcome, RepairError> {
        crash::panic_over("repair", &queued.did);
        let statuses = session.statuses(&[&queued.did]).await?;
        if statuses.get(&queued.did).is_some_and(|(_, status)| status.as_deref() == Some("deleted")) {
            let message = Some("the account is deleted".to_owned());
            return Ok(Outcome::Finished(Finished { state: "gone", message, ..Finished::default() }));
        }
        // Asked before its document is looked up: after a gap, most of the queue may be of one domain.
        if let Some(host) = queued.host.as_deref().filter(|_| !queued.is_backfill)
            && let Some(wait) = self.directory.budget_wait(host)
        {
            let message = format!("{host}: {}", repository::OVER_BUDGET);
            let host = Some(host.to_owned());
            let pause = wait.max(OVER_BUDGET_PAUSE);
            return Ok(Outcome::Postponed(Postponed { pause, host, message, ..Postponed::default() }));
        }
        let mut stream = self.redis.connect().await?;
        if stream.is_fed(&queued.did).await? {
            let message = Some(
                "others send its records, too (POST /events): they are not in its repository".to_owned(),
            );
            return Ok(Outcome::Finished(Finished { state: "gone", message, ..Finished::default() }));
        }
        let since = self.begin(&mut stream, &queued.did).await?;
        let (fetched, _slot) = self.fetch_in_turn(queued).await;
        let Fetched { key, car, host } = match fetched {
            Ok(fetched) => fetched,
            Err(outcome) => return Ok(outcome),
        };
        let host = Some(host);
        crash::at(Point::AfterFetch);
        let repository = match Repository::read(&car, &queued.did, &key) {
            Ok(repository) => repository,
            Err(invalid) => return Ok(Outcome::failed(host, invalid.to_string())),
        };
        let rev = repository.commit.rev.clone();
        if rev < queued.wanted_rev {
            // Its server may stay behind for long, and the account announce one revision after the other.
            let message = format!("its server has revision {rev}, older than {}", queued.wanted_rev);
            let pause = repos::COOLDOWN;
            return Ok(Outcome::Postponed(Postponed {
                pause,
                host,
                message,
                tried: true,
                ..Postponed::default()
            }));
        }
        if let Err(message) = check_rev(&rev, now_ms()) {
            return Ok(Outcome::failed(host, message));
        }
        let outcome = self.compare(session, queued, &repository, &since.place, host).await?;
        if matches!(outcome, Outcome::Finished(Finished { state: "synced", .. })) {
            let head = Head::new(&rev, &repository.commit.data);
            let now = stream.adopt_head(&queued.did, head, since.generation).await?;
            if since.head.is_none() && now.rev > head.rev {
                // Nobody has compared that one with this.
                repos::queue(session.client(), &queued.did, 1, "chain", "").await?;
            }
        }
        Ok(outcome)
    }

    /// What has to be known before the repository is fetched. From here on, the reader keeps what its account writes.
    async fn begin(&self, stream: &mut Stream, did: &str) -> Result<Since, RepairError> {
        if self.config.wanted_dids == Some(WantedDids::Tracked) {
            stream.track(&[did.to_owned()]).await?;
        }
        let (generation, _) = stream.generation().await?;
        let head = stream.known(&[did]).await?.get(did).and_then(|known| known.head);
        // Whatever is read from now on is newer than the repository, above all that the account is deleted.
        Ok(Since { place: stream.place().await?, generation, head })
    }

    /// Compares a repository with the rows, and appends the difference.
    async fn compare(
        &self,
        session: &Session,
        queued: &Queued,
        repository: &Repository<'_>,
        place: &Place,
        host: Option<String>,
    ) -> Result<Outcome, RepairError> {
        let (did, rev, data) = (&queued.did, &repository.commit.rev, repository.commit.data.to_string());
        let doubted = |deletes: usize, rows: usize| {
            deletes > FEW && deletes > rows / 2 && queued.doubted.as_ref() != Some(&data)
        };
        // Before anything is closed to older operations: what it would do.
        let difference = Difference::new(repository, session.own_rows(did).await?, &self.config.collections);
        if doubted(difference.deletes, difference.rows) {
            let message = format!(
                "the repository would delete {} of {} rows: a second look has to confirm it",
                difference.deletes, difference.rows
            );
            let postponed =
                Postponed { host, message, doubted: Some(data), tried: true, ..Postponed::default() };
            return Ok(Outcome::Postponed(postponed));
        }
        session.complete_repo(did, rev).await?;
        crash::at(Point::AfterComplete);
        // Now nothing older can come any more.
        let Some(refused) = self.write_until_equal(session, queued, repository, place).await? else {
            let message = "the pipelines have not applied it in time; it will be compared again".to_owned();
            return Ok(Outcome::failed(host, message));
        };
        Ok(Outcome::Finished(Finished {
            state: "synced",
            rev: rev.clone(),
            host,
            records: repository.records.len() as u64,
            healed: difference.healed().saturating_sub(refused) as u64,
            deleted: difference.deletes as u64,
            refused: refused as u64,
            message: (refused > 0).then(|| format!("{refused} records cannot be stored")),
        }))
    }

    /// Appends the difference, or applies it, until there is none: what was appended can be lost with Redis's last second.
    /// Returns how many changes have no effect, however often they are applied; `None` if they are not applied in time.
    async fn write_until_equal(
        &self,
        session: &Session,
        queued: &Queued,
        repository: &Repository<'_>,
        place: &Place,
    ) -> Result<Option<usize>, RepairError> {
        let did = &queued.did;
        let mut stream = self.redis.connect().await?;
        let mut before: Vec<Difference> = Vec::new();
        loop {
            let rows = session.own_rows(did).await?;
            let difference = Difference::new(repository, rows, &self.config.collections);
            if difference.is_empty() {
                return Ok(Some(0));
            }
            // Twice, because what was appended may have been removed by others.
            if before.len() >= 2 && before.iter().all(|before| difference.is_that_of(before)) {
                return Ok(Some(difference.healed() + difference.deletes));
            }
            let rev = &repository.commit.rev;
            let (entries, _) = entries_of(did, rev, &difference.ops(), &repository.archive);
            if queued.is_backfill {
                self.apply_here(session, entries, place).await?;
            } else if let Some(last) = self.append(&mut stream, entries, &place.1).await? {
                crash::at(Point::AfterRepair);
                if !self.applied(session, did, repository, &mut stream, last).await? {
                    return Ok(None);
                }
            }
            before.push(difference);
            if before.len() > 2 {
                before.remove(0);
            }
        }
    }

    /// Appends the entries as soon as there is room. Returns the last one's id; `None` if there are none.
    async fn append(
        &self,
        stream: &mut Stream,
        entries: Vec<String>,
        seq: &str,
    ) -> Result<Option<EntryId>, RepairError> {
        let mut last = None;
        let mut part = Vec::new();
        let mut bytes = 0;
        let mut entries = entries.into_iter().peekable();
        while let Some(entry) = entries.next() {
            bytes += entry.len();
            part.push(entry);
            if bytes >= APPEND_BYTES || entries.peek().is_none() {
                last = loop {
                    if let Some(id) = stream.append_repair(&part, seq, self.config.max_stream_len).await? {
                        break Some(id);
                    }
                    tokio::time::sleep(ROOM).await;
                };
                part.clear();
                bytes = 0;
            }
        }
        Ok(last)
    }

    /// Waits until what was appended is applied, but not for long. Everything up to the last entry is acknowledged by then; or the
    /// rows are as they should be, and what is not acknowledged is something else, in the hands of a worker that stands still.
    async fn applied(
        &self,
        session: &Session,
        did: &str,
        repository: &Repository<'_>,
        stream: &mut Stream,
        last: EntryId,
    ) -> Result<bool, RepairError> {
        let asked = Instant::now();
        let mut compare = COMPARE;
        while asked.elapsed() < APPLIED {
            let look = stream.look().await?;
            if look.oldest_unacknowledged().is_none_or(|oldest| oldest > last) {
                return Ok(true);
            }
            if asked.elapsed() > compare {
                compare *= 2;
                let rows = session.own_rows(did).await?;
                if Difference::new(repository, rows, &self.config.collections).is_empty() {
                    return Ok(true);
                }
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(false)
    }
}
