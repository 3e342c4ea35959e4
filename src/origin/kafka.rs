//! Events from a Kafka topic: each record holds what a request to `POST /events` may hold. The offsets are kept in Redis and move
//! in the same step as the entries, so each record is appended exactly once; the group's offsets are set only for those who watch
//! its lag. One process reads the topic; the others wait for its lease.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

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
const PARTITIONS: Duration = Duration::from_secs(30);
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
}

/// What a session reads with.
struct Session {
    stream: Stream,
    consumer: Consumer,
    /// The next offset of each partition.
    places: BTreeMap<i32, i64>,
    source: String,
    looked: Instant,
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
        }
    }

    /// Takes records until it is time to stop.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut delays = Backoff::default();
        while !stop.is_cancelled() {
            let Err(error) = self.session(&stop, &mut delays).await else { continue };
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
            let _ = or_stop(&stop, tokio::time::sleep(delays.pause())).await;
        }
        if let Ok(mut stream) = self.redis.connect().await {
            let _ = stream.release_lease(Lease::Origin, &self.token).await;
        }
        self.enter(State::Stopped);
    }

    fn enter(&self, state: State) {
        metrics::origin_disconnected(KIND, matches!(state, State::Starting | State::WaitingForBroker { .. }));
        self.status.origin(KIND, |origin| origin.enter(state));
    }

    /// One connection each to Redis and Kafka, while the lease is ours and nobody pauses the reader.
    async fn session(&mut self, stop: &CancellationToken, delays: &mut Backoff) -> Result<()> {
        if *self.paused.borrow_and_update() {
            self.enter(State::Paused);
            let _ = or_stop(stop, self.paused.wait_for(|paused| !paused)).await;
            return Ok(());
        }
        let mut stream = self.redis.connect().await?;
        if !stream.take_lease(Lease::Origin, &self.token).await? {
            self.enter(State::WaitingForLease { reason: "another process takes from this topic".to_owned() });
            let _ = or_stop(stop, tokio::time::sleep(FREE)).await;
            return Ok(());
        }
        let consumer = Consumer::open(&self.from.cluster, &self.from.topic, &self.name).await?;
        let mut session = Session {
            stream,
            consumer,
            places: BTreeMap::new(),
            source: String::new(),
            looked: Instant::now(),
        };
        self.find_places(&mut session).await?;
        info!(topic = self.from.topic, partitions = session.places.len(), "connected to Kafka");
        while !stop.is_cancelled() && !*self.paused.borrow() {
            if !session.stream.take_lease(Lease::Origin, &self.token).await? {
                break;
            }
            self.enter(State::Running);
            match session.consumer.next(WAIT).await {
                Ok(taken) => self.append(&mut session, &taken, stop).await?,
                Err(KafkaError::NoOffset(partitions)) => self.find_again(&mut session, &partitions).await?,
                Err(error) => return Err(error.into()),
            }
            self.said = None;
            delays.reset();
            if session.looked.elapsed() >= PARTITIONS {
                self.find_places(&mut session).await?;
            }
            self.note(&session).await;
        }
        session.consumer.close().await;
        Ok(())
    }

    /// Where each partition is to be read from: where we were, else at its beginning.
    async fn find_places(&self, session: &mut Session) -> Result<()> {
        let topic = session.consumer.topic().await?;
        let (source, mut places) = session.stream.positions(&self.from.topic).await?;
        let mut gaps = Vec::new();
        let is_new = source != topic.id;
        if is_new && !places.is_empty() && !source.is_empty() {
            warn!(
                topic = self.from.topic,
                "the Kafka topic was deleted and created again: it is read from its beginning"
            );
            let reason = format!("the Kafka topic {} was deleted and created again", self.from.topic);
            gaps.push(Gap::new(reason, None));
        }
        if is_new && !source.is_empty() {
            places.clear();
        }
        let known = places.len();
        for partition in &topic.partitions {
            if !places.contains_key(partition) {
                places.insert(*partition, session.consumer.range(*partition).await?.0);
            }
        }
        if is_new || places.len() > known {
            session.stream.set_positions(&self.from.topic, &topic.id, &places, &gaps).await?;
        }
        session.looked = Instant::now();
        session.source = topic.id;
        if session.places != places {
            session.consumer.read_from(&places).await?;
            session.places = places;
        }
        Ok(())
    }

    /// Partitions do not have the offset where we were: records were deleted before they were taken, or the log was cut off.
    async fn find_again(&self, session: &mut Session, partitions: &[i32]) -> Result<()> {
        let mut gaps = Vec::new();
        for partition in partitions {
            let (first, end) = session.consumer.range(*partition).await?;
            let Some(place) = session.places.get_mut(partition) else { continue };
            let (was, topic) = (*place, &self.from.topic);
            let reason = if was < first {
                *place = first;
                format!(
                    "Kafka {topic}-{partition}: the records from {was} to {} were deleted before they were taken",
                    first - 1
                )
            } else {
                *place = end.min(was);
                format!(
                    "Kafka {topic}-{partition}: it ends at {end}, before the position {was}: records were lost there"
                )
            };
            warn!(topic, partition, was, now = *place, "a gap in Kafka: {reason}");
            metrics::count(metrics::ORIGIN_GAPS, 1);
            let until = (was < first).then_some(first);
            gaps.push(Gap { until, ..Gap::new(reason, until.map(|_| was - 1)) });
        }
        let Session { stream, consumer, places, source, .. } = session;
        stream.set_positions(&self.from.topic, source, places, &gaps).await?;
        consumer.read_from(places).await?;
        Ok(())
    }

    /// Appends records, and moves the offsets in the same step.
    async fn append(&self, session: &mut Session, taken: &[Taken], stop: &CancellationToken) -> Result<()> {
        let mut rest = taken;
        while !rest.is_empty() && !stop.is_cancelled() {
            let mut bytes = 0;
            let fits = |record: &&Taken| {
                bytes += record.body.as_ref().map_or(0, bytes::Bytes::len);
                bytes < BATCH_BYTES
            };
            let count = rest.iter().take(BATCH_RECORDS).take_while(fits).count().max(1);
            let (batch, later) = rest.split_at(count);
            self.append_batch(session, batch, stop).await?;
            rest = later;
        }
        if !rest.is_empty() {
            bail!("stopped");
        }
        Ok(())
    }

    async fn append_batch(
        &self,
        session: &mut Session,
        batch: &[Taken],
        stop: &CancellationToken,
    ) -> Result<()> {
        let (mut events, mut wrong, mut moves) = (Vec::new(), 0, Moves::new());
        for Taken { partition, offset, body } in batch {
            let place = session.places.get(partition).copied();
            if place.is_some_and(|place| *offset < place) && !moves.contains_key(partition) {
                warn!(
                    topic = self.from.topic,
                    partition,
                    place,
                    offset,
                    "Kafka has cut off this partition, and goes on before our position"
                );
            }
            moves.entry(*partition).or_insert((place, 0)).1 = offset + 1;
            // One without content only deletes its key.
            if let Some(body) = body {
                let id = format!("{}/{partition}/{offset}", self.from.topic);
                wrong += u64::from(!self.messages.read(body, Some(&id), &mut events));
            }
        }
        let lines = events.len() as u64;
        let accepted = loop {
            let moves = Some((self.from.topic.clone(), moves.clone()));
            match self.ingest.append(None, &[], events.clone(), moves).await {
                Ok(accepted) => break accepted,
                Err(IngestError::NotNow(reason)) => {
                    self.enter(State::WaitingForRoom { reason: reason.to_owned() });
                }
                Err(error) => return Err(error.into()),
            }
            if or_stop(stop, tokio::time::sleep(NO_ROOM)).await.is_err()
                || !session.stream.take_lease(Lease::Origin, &self.token).await?
            {
                bail!("stopped");
            }
        };
        drop(accepted);
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
        Ok(())
    }

    /// Shows how much waits, and sets the group's offsets.
    async fn note(&mut self, session: &Session) {
        let waiting = session.consumer.waiting().await;
        self.status.origin(KIND, |origin| origin.waiting = Some(waiting));
        metrics::origin_waiting(KIND, waiting);
        if let Some(group) = &self.from.group
            && self.committed.elapsed() >= COMMIT
        {
            self.committed = Instant::now();
            // It only serves those who look: a failure changes nothing.
            if let Err(error) = session.consumer.commit(group, &session.places).await {
                debug!(group, %error, "cannot set the offsets of the Kafka group");
            }
        }
    }
}
