//! Publishes the applied events to a RabbitMQ exchange, as Jetstream messages, in the order of the stream. An entry counts as
//! published once RabbitMQ has confirmed all of its messages. One process publishes; the others wait for its lease.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::messages::{Item, Messages, Pages};
use crate::amqp::{AmqpError, Outgoing, Publisher};
use crate::config::{AmqpOutput, Config, RoutingKey};
use crate::event::EntryId;
use crate::metrics;
use crate::status::{OutputStatus, State, Status};
use crate::stop::or_stop;
use crate::store::Store;
use crate::stream::lease::{self, Lease};
use crate::stream::output::Output;
use crate::stream::settled::Place;
use crate::stream::{Redis, Stream, StreamError};
use crate::time::{Backoff, now_ms};

/// The place and the lease.
const OUTPUT: Output = Output::Amqp;
const LEASE: Lease = Lease::Output(OUTPUT);
/// The name in metrics and status.
const KIND: &str = OUTPUT.name();
/// The time between two looks while nothing is new.
const LOOK: Duration = Duration::from_millis(20);
/// How often the lease is prolonged, and how often to look whether it is free.
const PROLONG: Duration = Duration::from_secs(3);
const FREE: Duration = Duration::from_secs(1);
/// How long a page may take before that is shown, and how long one that was begun has at the end.
const SLOW: Duration = Duration::from_secs(10);
const LAST_PAGE: Duration = Duration::from_secs(2);
/// For how long a process that failed says so while another one tries, without getting any further.
const STILL_FAILING: Duration = Duration::from_mins(5);
/// Failures are logged again after this time.
const SAY_AGAIN: Duration = Duration::from_mins(1);

/// Publishes what is applied, for as long as the process runs.
pub struct Exchange {
    to: AmqpOutput,
    name: String,
    redis: Redis,
    messages: Messages,
    pages: Pages,
    status: Arc<Status>,
    token: String,
    said: Option<Instant>,
    /// Whether the log says that it publishes.
    announced: bool,
    /// When it last failed, and where the output was then.
    failed: Option<(Instant, Option<Place>)>,
    /// Where the output was when the session began.
    place: Option<Place>,
    /// The last entry that was published.
    last: Option<EntryId>,
    /// Up to this entry, messages are published one at a time: one was refused, and the others should not be repeated with it.
    careful_until: Option<EntryId>,
    /// The last message of this entry that was published in that way, by its index.
    done: Option<(EntryId, usize)>,
}

impl Exchange {
    /// An exchange to which nothing is published yet.
    #[must_use]
    pub fn new(to: AmqpOutput, config: &Config, redis: Redis, store: Store, status: Arc<Status>) -> Self {
        let first = OutputStatus {
            output: KIND,
            target: format!("{} at {}", to.exchange, to.server.host()),
            since_ms: now_ms(),
            ..OutputStatus::default()
        };
        status.output(KIND, |output| *output = first);
        metrics::output_disconnected(KIND, true);
        Self {
            to,
            name: format!("standpipe {}", config.consumer_id),
            redis,
            messages: Messages::new(store),
            pages: Pages::default(),
            status,
            token: lease::token(&config.consumer_id),
            said: None,
            announced: false,
            failed: None,
            place: None,
            last: None,
            careful_until: None,
            done: None,
        }
    }

    /// Publishes until it is time to stop.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut delays = Backoff::default();
        let cut = stop.clone();
        let in_time = async move {
            cut.cancelled().await;
            tokio::time::sleep(LAST_PAGE).await;
        };
        tokio::select! {
            () = self.sessions(&stop, &mut delays) => {}
            () = in_time => {}
        }
        self.release().await;
        self.enter(State::Stopped);
    }

    async fn sessions(&mut self, stop: &CancellationToken, delays: &mut Backoff) {
        while !stop.is_cancelled() {
            let Err(error) = self.session(stop, delays).await else { continue };
            let reason = format!("{error:#}");
            if self.said.is_none_or(|at| at.elapsed() >= SAY_AGAIN) {
                self.said = Some(Instant::now());
                let exchange = &self.to.exchange;
                warn!(exchange, reason, "cannot publish to RabbitMQ; the events stay in the stream");
            }
            self.enter(if error.is::<AmqpError>() {
                State::WaitingForBroker { reason }
            } else if error.is::<StreamError>() {
                State::WaitingForRedis { reason }
            } else {
                State::WaitingForPostgres { reason }
            });
            self.failed = Some((Instant::now(), self.place));
            self.announced = false;
            // Another process may reach what this one cannot, but it cannot bind a queue.
            let is_refused = matches!(
                error.downcast_ref::<AmqpError>(),
                Some(AmqpError::Unroutable(_) | AmqpError::NotStored)
            );
            if !is_refused {
                self.release().await;
            }
            let _ = or_stop(stop, tokio::time::sleep(delays.pause())).await;
        }
    }

    async fn release(&self) {
        if let Ok(mut stream) = self.redis.connect().await {
            let _ = stream.release_lease(LEASE, &self.token).await;
        }
    }

    fn enter(&self, state: State) {
        metrics::output_disconnected(KIND, matches!(state, State::Starting | State::WaitingForBroker { .. }));
        let behind = match (&state, self.last) {
            (State::WaitingForLease { .. } | State::Stopped, _) | (_, None) => Some(0.0),
            (State::Running, _) => None,
            (_, Some(last)) => Some(age(last)),
        };
        if let Some(seconds) = behind {
            metrics::output(KIND, 0, seconds);
        }
        self.status.output(KIND, |output| {
            output.behind_seconds = behind.unwrap_or(output.behind_seconds);
            output.enter(state);
        });
    }

    /// One connection each to Redis and RabbitMQ, while the lease is ours.
    async fn session(&mut self, stop: &CancellationToken, delays: &mut Backoff) -> Result<()> {
        let mut stream = self.redis.connect().await?;
        // From here on, nothing that is not published is trimmed.
        self.place = stream.output_place(OUTPUT).await?;
        let Some(place) = self.place else {
            let _ = or_stop(stop, tokio::time::sleep(LOOK)).await;
            return Ok(());
        };
        if let Place::Read(last) = place {
            self.last = Some(last);
        }
        if !stream.take_lease(LEASE, &self.token).await? {
            // The other one may fail, too; then it has not got any further.
            let fails = |(at, place): (Instant, _)| at.elapsed() < STILL_FAILING && place == self.place;
            if !self.failed.is_some_and(fails) {
                self.enter(State::WaitingForLease { reason: "another process is publishing".to_owned() });
            }
            let _ = or_stop(stop, tokio::time::sleep(FREE)).await;
            return Ok(());
        }
        let mut publisher = Publisher::open(&self.to.server, &self.to.exchange, &self.name).await?;
        while !stop.is_cancelled() && stream.take_lease(LEASE, &self.token).await? {
            publisher.check()?;
            let published = self.page(&mut stream, &mut publisher).await?;
            if !std::mem::replace(&mut self.announced, true) {
                info!(exchange = self.to.exchange, "publishing to RabbitMQ");
            }
            self.enter(State::Running);
            self.said = None;
            self.failed = None;
            delays.reset();
            match published {
                Published::Some => {}
                Published::Nothing => {
                    let _ = or_stop(stop, tokio::time::sleep(LOOK)).await;
                }
                Published::NotOurs => {
                    warn!(
                        "another process is publishing to RabbitMQ, or the output's position was changed: some messages may be published again"
                    );
                    break;
                }
            }
        }
        publisher.close().await;
        Ok(())
    }

    /// Publishes the next entries.
    async fn page(&mut self, stream: &mut Stream, publisher: &mut Publisher) -> Result<Published> {
        let Some(mut place) = stream.output_place(OUTPUT).await? else { return Ok(Published::Nothing) };
        let (Place::Read(from) | Place::Behind(from)) = place else {
            bail!("bug: unexpected position of the output in the stream")
        };
        let count = if self.careful_until.is_some_and(|until| from < until) { 1 } else { self.pages.count() };
        let page = if let Some(page) = stream.settled(&mut place, count).await? {
            page
        } else {
            let mut place = Place::Behind(from);
            let page = stream.settled(&mut place, count).await?.unwrap_or_default();
            if !page.is_empty() {
                error!(after = %from, "entries were removed from the stream before they were published");
                metrics::count(metrics::OUTPUT_SKIPPED, 1);
            }
            page
        };
        let Some(last) = page.last().map(|settled| settled.entry.id) else {
            self.note(0, None);
            return Ok(Published::Nothing);
        };
        self.pages.note(&page);
        let items = self.messages.of(&page).await?;
        // PostgreSQL may have taken its time.
        if !stream.take_lease(LEASE, &self.token).await? {
            return Ok(Published::NotOurs);
        }
        let messages: u64 = items.iter().map(|item| item.messages.len() as u64).sum();
        if !self.send(&items, count == 1, stream, publisher).await? {
            return Ok(Published::NotOurs);
        }
        if !stream.advance_output(OUTPUT, &self.token, from, last, page.len()).await? {
            return Ok(Published::NotOurs);
        }
        self.done = None;
        self.careful_until = self.careful_until.filter(|until| last < *until);
        self.note(messages, Some(last));
        Ok(Published::Some)
    }

    /// Publishes the messages of these entries; `false` if the lease is lost meanwhile.
    async fn send(
        &mut self,
        items: &[Item],
        careful: bool,
        stream: &mut Stream,
        publisher: &mut Publisher,
    ) -> Result<bool> {
        let began = Instant::now();
        let mut done = self.done.take();
        let sent = {
            let mut sending = pin!(send(self.to.key, items, careful, &mut done, publisher));
            loop {
                tokio::select! {
                    sent = &mut sending => break Some(sent),
                    () = tokio::time::sleep(PROLONG) => {
                        match stream.take_lease(LEASE, &self.token).await {
                            Ok(true) => {}
                            Ok(false) => break None,
                            // What was sent cannot be taken back: it is waited for, whatever happens to Redis.
                            Err(_) => {
                                if let Ok(again) = self.redis.connect().await {
                                    *stream = again;
                                }
                            }
                        }
                        let waited = began.elapsed();
                        if waited > SLOW {
                            let reason =
                                format!("RabbitMQ has not confirmed all messages after {} s", waited.as_secs());
                            self.enter(State::WaitingForBroker { reason });
                        }
                    }
                }
            }
        };
        self.done = done;
        let Some(sent) = sent else { return Ok(false) };
        if matches!(sent, Err(AmqpError::Unroutable(_) | AmqpError::NotStored)) {
            self.careful_until = self.careful_until.max(items.last().map(|item| item.id));
        }
        sent?;
        Ok(true)
    }

    fn note(&mut self, messages: u64, last: Option<EntryId>) {
        // Until it finds nothing new, it is as far behind as what it published last is old.
        let behind = last.map_or(0.0, age);
        self.last = last.or(self.last);
        metrics::output(KIND, messages, behind);
        self.status.output(KIND, |output| {
            output.messages += messages;
            output.behind_seconds = behind;
            if messages > 0 {
                output.last_ms = Some(now_ms());
            }
        });
    }
}

fn age(id: EntryId) -> f64 {
    now_ms().saturating_sub(id.ms) as f64 / 1000.0
}

/// An entry's messages, to be published.
fn outgoing(by: RoutingKey, item: &Item) -> impl Iterator<Item = Outgoing> {
    item.messages.iter().map(move |message| Outgoing {
        key: match by {
            RoutingKey::Did => message.did.clone(),
            RoutingKey::Collection => message.collection.clone().unwrap_or_else(|| message.kind.to_owned()),
        },
        id: format!("{}/{}", item.id, message.index),
        body: message.text.to_vec(),
    })
}

/// Publishes the messages of these entries: all at once, or with `careful` one at a time, leaving out those already `done`.
async fn send(
    by: RoutingKey,
    items: &[Item],
    careful: bool,
    done: &mut Option<(EntryId, usize)>,
    publisher: &mut Publisher,
) -> Result<(), AmqpError> {
    if !careful {
        return publisher.publish(items.iter().flat_map(|item| outgoing(by, item)).collect()).await;
    }
    for item in items {
        let last = done.filter(|(id, _)| *id == item.id).map(|(_, index)| index);
        for (message, outgoing) in item.messages.iter().zip(outgoing(by, item)) {
            if last.is_some_and(|last| message.index <= last) {
                continue;
            }
            publisher.publish(vec![outgoing]).await?;
            *done = Some((item.id, message.index));
        }
    }
    Ok(())
}

/// What became of a page.
enum Published {
    /// There was one.
    Some,
    /// There is nothing new.
    Nothing,
    /// Another process publishes, or the output was moved.
    NotOurs,
}
