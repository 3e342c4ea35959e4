//! Events from a Kafka topic: each record holds what a request to `POST /events` may hold. The offsets are kept in Redis and move
//! in the same step as the entries, so each record is appended exactly once; the group's offsets are set only for those who watch
//! its lag. One process reads the topic; the others wait for its lease.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::ingest::{Ingest, IngestError};
use super::messages::Messages;
use crate::config::{Config, KafkaOrigin};
use crate::kafka::{Consumer, KafkaError, Taken};
use crate::metrics;
use crate::status::{OriginStatus, State, Status};
use crate::stop::or_stop;
use crate::stream::gap::Gap;
use crate::stream::lease::{self, Lease};
use crate::stream::positions::Moves;
use crate::stream::{Redis, Stream};
use crate::time::{Backoff, now_ms};

/// The name in metrics and status.
const KIND: &str = metrics::KAFKA;
/// How long to wait for records: the lease is prolonged in between.
const WAIT: Duration = Duration::from_secs(1);
/// About how many bytes are appended at a time, and the most lines.
const BATCH_BYTES: usize = 1 << 20;
const BATCH_RECORDS: usize = 200;
/// How often the group's offsets are set, and new partitions are looked for.
const COMMIT: Duration = Duration::from_secs(5);
const PARTITIONS: Duration = Duration::from_secs(10);
/// How long setting the group's offsets may take.
const COMMIT_LIMIT: Duration = Duration::from_secs(2);
/// How long some partition may be silent before that is an outage.
const QUIET: Duration = Duration::from_secs(8);
/// How often to look whether the lease is free.
const FREE: Duration = Duration::from_secs(1);
/// The pause before another attempt while there is no room.
const NO_ROOM: Duration = Duration::from_millis(200);
/// Failures are logged again after this time.
const SAY_AGAIN: Duration = Duration::from_mins(1);

/// Takes records from a topic, for as long as the process runs.
pub struct Partitions {
    from: KafkaOrigin,
    name: String,
    ingest: Ingest,
    messages: Messages,
    redis: Redis,
    status: Arc<Status>,
    paused: watch::Receiver<bool>,
    token: String,
    said: Option<Instant>,
    committed: Instant,
    /// Whether it was logged that the group's offsets cannot be set.
    warned: bool,
}

/// What a session reads with.
struct Session {
    stream: Stream,
    consumer: Consumer,
    /// The next offset of each partition.
    places: BTreeMap<i32, i64>,
    /// The topic's id.
    source: String,
    /// When partitions were last looked for.
    looked: Instant,
    /// When all partitions had answered.
    answered: Instant,
}

impl Partitions {
    /// A topic that nothing is taken from yet.
    #[must_use]
    pub fn new(
        from: KafkaOrigin,
        config: &Config,
        redis: Redis,
        status: Arc<Status>,
        paused: watch::Receiver<bool>,
    ) -> Self {
        let source = format!("{} at {}", from.topic, from.cluster.servers());
        let messages = Messages {
            source: format!("Kafka topic {}", from.topic),
            takes_tasks: config.handlers.is_some(),
        };
        metrics::origin_disconnected(KIND, true);
        let first = OriginStatus { origin: KIND, source, since_ms: now_ms(), ..OriginStatus::default() };
        status.origin(KIND, |origin| *origin = first);
        Self {
            name: format!("standpipe-{}", config.consumer_id),
            token: lease::token(&config.consumer_id),
            ingest: Ingest::new(config, redis.clone()),
            from,
            messages,
            redis,
            status,
            paused,
            said: None,
            committed: Instant::now(),
            warned: false,
        }
    }

    /// Takes records until it is time to stop.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut delays = Backoff::default();
        while !stop.is_cancelled() {
            let Some(Err(error)) = stop.run_until_cancelled(self.session(&mut delays)).await else {
                continue;
            };
            let reason = format!("{error:#}");
            if self.said.is_none_or(|at| at.elapsed() >= SAY_AGAIN) {
                self.said = Some(Instant::now());
                let topic = &self.from.topic;
                warn!(topic, reason, "cannot take records from Kafka; they stay in the topic");
            }
            self.enter(if error.is::<KafkaError>() {
                State::WaitingForBroker { reason }
            } else {
                State::WaitingForRedis { reason }
            });
            // Another process may reach what this one cannot.
            self.release().await;
            let _ = or_stop(&stop, tokio::time::sleep(delays.pause())).await;
        }
        self.release().await;
        self.enter(State::Stopped);
    }

    async fn release(&self) {
        if let Ok(mut stream) = self.redis.connect().await {
            let _ = stream.release_lease(Lease::Origin, &self.token).await;
        }
    }

    fn enter(&self, state: State) {
        metrics::origin_disconnected(KIND, matches!(state, State::Starting | State::WaitingForBroker { .. }));
        let reads = matches!(state, State::Running | State::WaitingForRoom { .. });
        if !reads {
            metrics::origin_waiting(KIND, 0);
        }
        self.status.origin(KIND, |origin| {
            origin.waiting = origin.waiting.filter(|_| reads);
            origin.enter(state);
        });
    }

    /// One connection each to Redis and Kafka, while the lease is ours and nobody pauses the reader.
    async fn session(&mut self, delays: &mut Backoff) -> Result<()> {
        if *self.paused.borrow_and_update() {
            self.enter(State::Paused);
            let _ = self.paused.wait_for(|paused| !paused).await;
            return Ok(());
        }
        let mut stream = self.redis.connect().await?;
        if !stream.take_lease(Lease::Origin, &self.token).await? {
            self.enter(State::WaitingForLease { reason: "another process takes from a topic".to_owned() });
            tokio::time::sleep(FREE).await;
            return Ok(());
        }
        let consumer = Consumer::open(&self.from.cluster, &self.from.topic, &self.name).await?;
        let mut session = Session {
            stream,
            consumer,
            places: BTreeMap::new(),
            source: String::new(),
            looked: Instant::now(),
            answered: Instant::now(),
        };
        let ended = self.take(&mut session, delays).await;
        session.consumer.close().await;
        ended
    }

    async fn take(&mut self, session: &mut Session, delays: &mut Backoff) -> Result<()> {
        if !self.find_places(session).await? {
            return Ok(());
        }
        info!(topic = self.from.topic, partitions = session.places.len(), "connected to Kafka");
        while !*self.paused.borrow() && session.stream.take_lease(Lease::Origin, &self.token).await? {
            let ours = match session.consumer.next(WAIT).await {
                // Of a topic that is another one by now, if its offsets are smaller.
                Ok(_) if session.consumer.known_id().await.is_some_and(|id| id != session.source) => {
                    self.find_places(session).await?
                }
                Ok(taken) if taken.is_empty() => self.pass_over(session).await?,
                Ok(taken) => self.append(session, &taken).await?,
                Err(KafkaError::NoOffset(partitions)) => self.find_again(session, &partitions).await?,
                Err(error) => return Err(error.into()),
            };
            if !ours || (session.looked.elapsed() >= PARTITIONS && !self.find_places(session).await?) {
                break;
            }
            self.note(session).await?;
            self.enter(State::Running);
            self.said = None;
            delays.reset();
        }
        Ok(())
    }

    /// Where each partition is to be read from: where we were, else at its beginning. `false` if another process moves them.
    async fn find_places(&self, session: &mut Session) -> Result<bool> {
        let topic = session.consumer.topic().await?;
        let (source, known) = session.stream.positions(&self.from.topic).await?;
        let is_another = !source.is_empty() && !topic.id.is_empty() && source != topic.id;
        let (mut places, mut moves) = (BTreeMap::new(), Moves::new());
        let mut gaps = Vec::new();
        if is_another {
            warn!(
                topic = self.from.topic,
                "the Kafka topic was deleted and created again: it is read from its beginning"
            );
            let reason = format!("the Kafka topic {} was deleted and created again", self.from.topic);
            gaps.push(Gap::new(reason, None));
        }
        for partition in topic.partitions {
            let place = known.get(&partition).copied().filter(|_| !is_another);
            if let Some(place) = place {
                places.insert(partition, place);
                continue;
            }
            match session.consumer.range(partition).await {
                Ok((first, _)) => {
                    moves.insert(partition, (None, first));
                    places.insert(partition, first);
                }
                // It has no leader: the others do not wait for it.
                Err(error) => {
                    warn!(topic = self.from.topic, partition, %error, "cannot read a Kafka partition yet");
                }
            }
            session.stream.take_lease(Lease::Origin, &self.token).await?;
        }
        let source = if topic.id.is_empty() { source } else { topic.id };
        if (is_another || !moves.is_empty() || session.source != source)
            && !self.set(session, &source, &moves, &gaps).await?
        {
            return Ok(false);
        }
        session.looked = Instant::now();
        session.source = source;
        if session.places != places {
            session.consumer.read_from(&places).await?;
            session.places = places;
        }
        Ok(true)
    }

    /// Moves positions, and reports gaps. `false` if another process moves them.
    async fn set(&self, session: &mut Session, source: &str, moves: &Moves, gaps: &[Gap]) -> Result<bool> {
        let Session { stream, .. } = session;
        let ours = stream.set_positions(&self.from.topic, &self.token, source, moves, gaps).await?;
        if ours {
            metrics::count(metrics::ORIGIN_GAPS, gaps.len() as u64);
        }
        Ok(ours)
    }

    /// Partitions do not have the offset where we were: records were deleted before they were taken, or the log was cut off.
    async fn find_again(&self, session: &mut Session, partitions: &[i32]) -> Result<bool> {
        let (mut moves, mut gaps) = (Moves::new(), Vec::new());
        for partition in partitions {
            let (first, end) = session.consumer.range(*partition).await?;
            session.stream.take_lease(Lease::Origin, &self.token).await?;
            let Some(was) = session.places.get(partition).copied() else { continue };
            let topic = &self.from.topic;
            let (place, reason) = if was < first {
                let last = first - 1;
                (first, format!("the records from {was} to {last} were deleted before they were taken"))
            } else if was > end {
                (end, format!("it ends at {end}, before our position {was}: records were lost there"))
            } else {
                // It has it by now.
                continue;
            };
            let reason = format!("Kafka {topic}-{partition}: {reason}");
            warn!(was, now = place, "{reason}");
            let until = (was < first).then_some(first);
            gaps.push(Gap { until, ..Gap::new(reason, until.map(|_| was - 1)) });
            moves.insert(*partition, (Some(was), place));
        }
        let source = session.source.clone();
        if !self.set(session, &source, &moves, &gaps).await? {
            return Ok(false);
        }
        session.places.extend(moves.into_iter().map(|(partition, (_, place))| (partition, place)));
        session.consumer.read_from(&session.places).await?;
        Ok(true)
    }

    /// Moves positions over what is no record: the ends of transactions, and what was aborted or removed.
    async fn pass_over(&self, session: &mut Session) -> Result<bool> {
        let mut moves = Moves::new();
        for (partition, was) in &session.places {
            if let Some(place) = session.consumer.place(*partition).await.filter(|place| place > was) {
                moves.insert(*partition, (Some(*was), place));
            }
        }
        if moves.is_empty() {
            return Ok(true);
        }
        let source = session.source.clone();
        let ours = self.set(session, &source, &moves, &[]).await?;
        session.places.extend(moves.into_iter().map(|(partition, (_, place))| (partition, place)));
        Ok(ours)
    }

    /// Appends records, and moves the offsets in the same step. `false` if another process moves them, or an operator pauses us.
    async fn append(&self, session: &mut Session, taken: &[Taken]) -> Result<bool> {
        let mut rest = taken;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = |record: &&Taken| {
                bytes += record.body.as_ref().map_or(0, bytes::Bytes::len);
                bytes < BATCH_BYTES
            };
            let count = rest.iter().take(BATCH_RECORDS).take_while(fits).count().max(1);
            let (batch, later) = rest.split_at(count);
            if !self.append_batch(session, batch).await? {
                return Ok(false);
            }
            rest = later;
        }
        Ok(true)
    }

    async fn append_batch(&self, session: &mut Session, batch: &[Taken]) -> Result<bool> {
        let (mut events, mut wrong, mut moves) = (Vec::new(), 0, Moves::new());
        let topic = &self.from.topic;
        for Taken { partition, offset, epoch, body } in batch {
            let place = session.places.get(partition).copied();
            if let Some(was) = place.filter(|place| offset < place)
                && !moves.contains_key(partition)
            {
                let reason = format!(
                    "Kafka {topic}-{partition}: it was cut off at {offset}, before our position {was}: records were lost there"
                );
                warn!("{reason}");
                let source = session.source.clone();
                if !self.set(session, &source, &Moves::new(), &[Gap::new(reason, None)]).await? {
                    return Ok(false);
                }
            }
            moves.entry(*partition).or_insert((place, 0)).1 = offset + 1;
            // One without content only deletes its key.
            if let Some(body) = body {
                // The same offset can stand for another record after the topic was created again, or cut off.
                let id = format!("{topic}/{}/{partition}/{epoch}/{offset}", session.source);
                wrong += u64::from(!self.messages.read(body, Some(&id), &mut events));
            }
        }
        let lines = events.len() as u64;
        loop {
            let moves = Some((topic.clone(), moves.clone()));
            match self.ingest.append(None, &[], events.clone(), moves).await {
                Ok(_) => break,
                Err(IngestError::NotNow(reason)) => {
                    self.enter(State::WaitingForRoom { reason: reason.to_owned() });
                }
                Err(IngestError::Moved) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
            tokio::time::sleep(NO_ROOM).await;
            if *self.paused.borrow() || !session.stream.take_lease(Lease::Origin, &self.token).await? {
                return Ok(false);
            }
        }
        for (partition, (_, next)) in moves {
            session.places.insert(partition, next);
        }
        metrics::count(metrics::INGESTED, lines);
        metrics::origin_messages(KIND, batch.len() as u64 - wrong, wrong);
        self.status.origin(KIND, |origin| {
            origin.messages += batch.len() as u64;
            origin.unusable += wrong;
            origin.last_ms = Some(now_ms());
        });
        session.answered = Instant::now();
        Ok(true)
    }

    /// Shows how much waits, notices partitions that do not answer, and sets the group's offsets.
    async fn note(&mut self, session: &mut Session) -> Result<()> {
        let (waiting, silent) = session.consumer.waiting().await;
        self.status.origin(KIND, |origin| origin.waiting = Some(waiting));
        metrics::origin_waiting(KIND, waiting);
        if silent.is_empty() {
            session.answered = Instant::now();
        } else if session.answered.elapsed() > QUIET {
            return Err(KafkaError::Silent(silent).into());
        }
        if let Some(group) = &self.from.group
            && self.committed.elapsed() >= COMMIT
        {
            let committed = timeout(COMMIT_LIMIT, session.consumer.commit(group, &session.places)).await;
            self.committed = Instant::now();
            // It only serves those who look: a failure changes nothing.
            let error = match committed {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("no answer within {COMMIT_LIMIT:?}"),
            };
            if !std::mem::replace(&mut self.warned, true) {
                warn!(group, error, "cannot set the offsets of the Kafka group, which only show its lag");
            }
        }
        Ok(())
    }
}
