//! Events from a RabbitMQ queue: each message holds what a request to `POST /events` may hold, and is acknowledged when its
//! events are durable.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::ingest::lines::Line;
use super::ingest::{Accepted, Appended, Ingest, IngestError};
use super::messages::Messages;
use crate::amqp::{AmqpError, Consumer, Delivery};
use crate::config::{AmqpOrigin, Config};
use crate::metrics;
use crate::status::{OriginStatus, State, Status};
use crate::stop::{Stopped, or_stop};
use crate::stream::Redis;
use crate::time::{Backoff, now_ms};

/// The name in metrics and status.
const KIND: &str = metrics::RABBITMQ;
/// About how many bytes of messages are appended at a time.
const BATCH_BYTES: usize = 1 << 20;
/// The pause before another attempt while there is no room.
const NO_ROOM: Duration = Duration::from_millis(200);
/// Failures are logged again after this time.
const SAY_AGAIN: Duration = Duration::from_mins(1);

/// Takes messages from a queue, for as long as the process runs.
pub struct Queue {
    from: AmqpOrigin,
    name: String,
    ingest: Ingest,
    messages: Messages,
    status: Arc<Status>,
    paused: watch::Receiver<bool>,
    said: Option<Instant>,
    warned: AtomicBool,
}

/// Why a session ends.
enum Ended {
    Stopped,
    Failed(AmqpError),
}

impl From<Stopped> for Ended {
    fn from(_: Stopped) -> Self {
        Self::Stopped
    }
}

impl From<AmqpError> for Ended {
    fn from(error: AmqpError) -> Self {
        Self::Failed(error)
    }
}

impl Queue {
    /// A queue that nothing is taken from yet.
    #[must_use]
    pub fn new(
        from: AmqpOrigin,
        config: &Config,
        redis: Redis,
        status: Arc<Status>,
        paused: watch::Receiver<bool>,
    ) -> Self {
        let name = format!("standpipe {}", config.consumer_id);
        let source = format!("RabbitMQ queue {}", from.queue);
        let messages = Messages { source, takes_tasks: config.handlers.is_some() };
        metrics::origin_disconnected(KIND, true);
        status.origin(KIND, |origin| *origin = Self::status(&from));
        Self {
            from,
            name,
            ingest: Ingest::new(config, redis),
            messages,
            status,
            paused,
            said: None,
            warned: false.into(),
        }
    }

    /// The status before anything happened.
    fn status(from: &AmqpOrigin) -> OriginStatus {
        OriginStatus {
            origin: KIND,
            source: format!("{} at {}", from.queue, from.server.host()),
            since_ms: now_ms(),
            ..OriginStatus::default()
        }
    }

    /// Takes messages until it is time to stop.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut delays = Backoff::default();
        loop {
            match self.session(&stop, &mut delays).await {
                Err(Ended::Stopped) => break,
                Ok(()) => delays.reset(),
                Err(Ended::Failed(error)) => {
                    let reason = error.to_string();
                    if self.said.is_none_or(|at| at.elapsed() >= SAY_AGAIN) {
                        self.said = Some(Instant::now());
                        let queue = &self.from.queue;
                        warn!(queue, reason, "cannot take messages from RabbitMQ; they stay in the queue");
                    }
                    self.enter(State::WaitingForBroker { reason });
                    if or_stop(&stop, tokio::time::sleep(delays.pause())).await.is_err() {
                        break;
                    }
                }
            }
        }
        self.enter(State::Stopped);
    }

    fn enter(&self, state: State) {
        metrics::origin_disconnected(KIND, matches!(state, State::Starting | State::WaitingForBroker { .. }));
        self.status.origin(KIND, |origin| origin.enter(state));
    }

    /// One connection; returns when an operator pauses the reader.
    async fn session(&mut self, stop: &CancellationToken, delays: &mut Backoff) -> Result<(), Ended> {
        if *self.paused.borrow_and_update() {
            self.enter(State::Paused);
            let _ = or_stop(stop, self.paused.wait_for(|paused| !paused)).await?;
        }
        let AmqpOrigin { server, queue, prefetch } = &self.from;
        let mut consumer = or_stop(stop, Consumer::open(server, queue, *prefetch, &self.name)).await??;
        info!(queue, prefetch, waiting = consumer.waiting(), "connected to RabbitMQ");
        self.enter(State::Running);
        let ended = self.take(&mut consumer, stop, delays).await;
        if !matches!(ended, Err(Ended::Failed(_))) {
            consumer.close().await;
        }
        ended
    }

    async fn take(
        &mut self,
        consumer: &mut Consumer,
        stop: &CancellationToken,
        delays: &mut Backoff,
    ) -> Result<(), Ended> {
        while !*self.paused.borrow_and_update() {
            let taken = or_stop(stop, consumer.next(BATCH_BYTES)).await??;
            self.note_waiting(consumer);
            if let Some(batch) = taken {
                self.append(&batch, consumer, stop).await?;
                self.said = None;
                delays.reset();
            }
        }
        Ok(())
    }

    fn note_waiting(&self, consumer: &Consumer) {
        self.status.origin(KIND, |origin| origin.waiting = Some(u64::from(consumer.waiting())));
        metrics::origin_waiting(KIND, consumer.waiting().into());
    }

    /// Appends the events of these messages, waits until they are durable, and acknowledges the messages.
    async fn append(
        &self,
        batch: &[Delivery],
        consumer: &mut Consumer,
        stop: &CancellationToken,
    ) -> Result<(), Ended> {
        let (mut events, mut wrong) = (Vec::new(), 0);
        for delivery in batch {
            let usable = self.messages.read(&delivery.body, delivery.id.as_deref(), &mut events);
            wrong += u64::from(!usable);
        }
        let (mut appended, mut tried) = (None, false);
        let accepted = loop {
            let state = match self.accept(&events, &mut appended).await {
                Ok(accepted) => break accepted,
                Err(IngestError::NotNow(reason)) => State::WaitingForRoom { reason: reason.to_owned() },
                Err(error) => State::WaitingForRedis { reason: error.to_string() },
            };
            if std::mem::replace(&mut tried, true) {
                self.enter(state);
            }
            or_stop(stop, tokio::time::sleep(NO_ROOM)).await?;
            // If the messages went back to the queue, they are not ours any more.
            consumer.check().await?;
            self.note_waiting(consumer);
        };
        self.is_durable(&accepted);
        self.enter(State::Running);
        let Some(last) = batch.last() else { return Ok(()) };
        consumer.acknowledge(last.tag).await?;
        metrics::count(metrics::INGESTED, accepted.ids.len() as u64);
        metrics::origin_messages(KIND, batch.len() as u64 - wrong, wrong);
        let repeated = batch.iter().filter(|delivery| delivery.redelivered).count() as u64;
        self.status.origin(KIND, |origin| {
            origin.messages += batch.len() as u64;
            origin.unusable += wrong;
            origin.redelivered += repeated;
            origin.last_ms = Some(now_ms());
        });
        Ok(())
    }

    /// Appends the events, once unless the server lost them or it is not known whether it has them: the same revisions again change
    /// nothing. Then waits until they are durable.
    async fn accept(
        &self,
        events: &[Line],
        appended: &mut Option<Appended>,
    ) -> Result<Accepted, IngestError> {
        let (mut there, before) = match appended.take() {
            Some(there) => (there, true),
            None => (self.ingest.append(None, &[], events.to_vec(), None).await?, false),
        };
        let settled = async {
            if before {
                self.ingest.look_again(&mut there).await?;
            }
            self.ingest.settle(&there).await
        };
        let settled = settled.await;
        if !matches!(settled, Err(IngestError::Replaced)) {
            *appended = Some(there);
        }
        settled
    }

    /// Warns, once, if Redis cannot guarantee durability.
    fn is_durable(&self, accepted: &Accepted) {
        if !accepted.durable && !self.warned.swap(true, Ordering::Relaxed) {
            warn!(
                "messages from RabbitMQ are acknowledged although Redis may lose them: it has no append-only file, or never flushes it; \
                 set appendonly yes and appendfsync everysec"
            );
        }
    }
}
