//! Publishes the applied events to a broker, as Jetstream messages, in the order of the stream. An entry counts as published once
//! the broker has confirmed all of its messages. One process publishes; the others wait for its lease.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::jetstream::Message;
use super::messages::{Item, Messages, Pages};
use crate::config::Config;
use crate::event::{EntryId, Outgoing};
use crate::metrics;
use crate::status::{OutputStatus, State, Status};
use crate::stop::or_stop;
use crate::store::Store;
use crate::stream::lease::{self, Lease};
use crate::stream::output::Output;
use crate::stream::settled::Place;
use crate::stream::{Redis, Stream, StreamError};
use crate::time::{Backoff, now_ms};

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

/// Where messages are published.
pub trait Broker: Send + Sync + 'static {
    /// The position in the stream, and the name in metrics and status.
    const OUTPUT: Output;
    /// Its name, for people.
    const NAME: &'static str;
    /// Why it does not take messages.
    type Error: std::error::Error + Send + Sync + 'static;
    /// A connection.
    type Publisher: Send;

    /// The exchange or topic, and where it is.
    fn target(&self) -> (String, String);

    /// What a message is routed by.
    fn key(&self, message: &Message) -> String;

    /// Connects.
    fn open(&self, name: &str) -> impl Future<Output = Result<Self::Publisher, Self::Error>> + Send;

    /// Notices that the connection is unusable.
    ///
    /// # Errors
    ///
    /// It is.
    fn check(publisher: &mut Self::Publisher) -> Result<(), Self::Error>;

    /// Publishes messages, and waits until all are confirmed.
    fn publish(
        publisher: &mut Self::Publisher,
        messages: Vec<Outgoing>,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Disconnects.
    fn close(publisher: Self::Publisher) -> impl Future<Output = ()> + Send;

    /// Whether one message was refused, rather than the broker unreachable: another process would fare no better.
    fn is_refusal(error: &Self::Error) -> bool;

    /// Whether a refused message can never be published: it is left out, and counted.
    #[must_use]
    fn is_final(_: &Self::Error) -> bool {
        false
    }
}

/// Publishes what is applied, for as long as the process runs.
pub struct Outlet<B> {
    to: B,
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

impl<B: Broker> Outlet<B> {
    /// The name in metrics and status.
    const KIND: &'static str = B::OUTPUT.name();
    const LEASE: Lease = Lease::Output(B::OUTPUT);

    /// An output to which nothing is published yet.
    #[must_use]
    pub fn new(to: B, config: &Config, redis: Redis, store: Store, status: Arc<Status>) -> Self {
        let (target, host) = to.target();
        let first = OutputStatus {
            output: Self::KIND,
            target: format!("{target} at {host}"),
            since_ms: now_ms(),
            ..OutputStatus::default()
        };
        status.output(Self::KIND, |output| *output = first);
        metrics::output_disconnected(Self::KIND, true);
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
                let (broker, (target, _)) = (B::NAME, self.to.target());
                warn!(target, reason, "cannot publish to {broker}; the events stay in the stream");
            }
            self.enter(if error.is::<B::Error>() {
                State::WaitingForBroker { reason }
            } else if error.is::<StreamError>() {
                State::WaitingForRedis { reason }
            } else {
                State::WaitingForPostgres { reason }
            });
            self.failed = Some((Instant::now(), self.place));
            self.announced = false;
            // Another process may reach what this one cannot, but it cannot bind a queue.
            if !error.downcast_ref::<B::Error>().is_some_and(B::is_refusal) {
                self.release().await;
            }
            let _ = or_stop(stop, tokio::time::sleep(delays.pause())).await;
        }
    }

    async fn release(&self) {
        if let Ok(mut stream) = self.redis.connect().await {
            let _ = stream.release_lease(Self::LEASE, &self.token).await;
        }
    }

    fn enter(&self, state: State) {
        metrics::output_disconnected(
            Self::KIND,
            matches!(state, State::Starting | State::WaitingForBroker { .. }),
        );
        let behind = match (&state, self.last) {
            (State::WaitingForLease { .. } | State::Stopped, _) | (_, None) => Some(0.0),
            (State::Running, _) => None,
            (_, Some(last)) => Some(age(last)),
        };
        if let Some(seconds) = behind {
            metrics::output(Self::KIND, 0, seconds);
        }
        self.status.output(Self::KIND, |output| {
            output.behind_seconds = behind.unwrap_or(output.behind_seconds);
            output.enter(state);
        });
    }

    /// One connection each to Redis and the broker, while the lease is ours.
    async fn session(&mut self, stop: &CancellationToken, delays: &mut Backoff) -> Result<()> {
        let mut stream = self.redis.connect().await?;
        // From here on, nothing that is not published is trimmed.
        self.place = stream.output_place(B::OUTPUT).await?;
        let Some(place) = self.place else {
            let _ = or_stop(stop, tokio::time::sleep(LOOK)).await;
            return Ok(());
        };
        if let Place::Read(last) = place {
            self.last = Some(last);
        }
        if !stream.take_lease(Self::LEASE, &self.token).await? {
            // The other one may fail, too; then it has not got any further.
            let fails = |(at, place): (Instant, _)| at.elapsed() < STILL_FAILING && place == self.place;
            if !self.failed.is_some_and(fails) {
                self.enter(State::WaitingForLease { reason: "another process is publishing".to_owned() });
            }
            let _ = or_stop(stop, tokio::time::sleep(FREE)).await;
            return Ok(());
        }
        let mut publisher = self.to.open(&self.name).await?;
        let ended = self.publish(&mut stream, &mut publisher, stop, delays).await;
        B::close(publisher).await;
        ended
    }

    async fn publish(
        &mut self,
        stream: &mut Stream,
        publisher: &mut B::Publisher,
        stop: &CancellationToken,
        delays: &mut Backoff,
    ) -> Result<()> {
        while !stop.is_cancelled() && stream.take_lease(Self::LEASE, &self.token).await? {
            B::check(publisher)?;
            let published = self.page(stream, publisher).await?;
            if !std::mem::replace(&mut self.announced, true) {
                info!(target = self.to.target().0, "publishing to {}", B::NAME);
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
                        "another process is publishing to {}, or the output's position was changed: some messages may be published again",
                        B::NAME
                    );
                    break;
                }
            }
        }
        Ok(())
    }

    /// Publishes the next entries.
    async fn page(&mut self, stream: &mut Stream, publisher: &mut B::Publisher) -> Result<Published> {
        let Some(mut place) = stream.output_place(B::OUTPUT).await? else { return Ok(Published::Nothing) };
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
        let items = self.messages.of(&page, &mut self.pages).await?;
        // PostgreSQL may have taken its time.
        if !stream.take_lease(Self::LEASE, &self.token).await? {
            return Ok(Published::NotOurs);
        }
        let messages: u64 = items.iter().map(|item| item.messages.len() as u64).sum();
        if !self.send(&items, count == 1, stream, publisher).await? {
            return Ok(Published::NotOurs);
        }
        if !stream.advance_output(B::OUTPUT, &self.token, from, last, page.len()).await? {
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
        publisher: &mut B::Publisher,
    ) -> Result<bool> {
        let began = Instant::now();
        let mut done = self.done.take();
        let sent = {
            let mut sending = pin!(send(&self.to, items, careful, &mut done, publisher));
            loop {
                tokio::select! {
                    sent = &mut sending => break Some(sent),
                    () = tokio::time::sleep(PROLONG) => {
                        match stream.take_lease(Self::LEASE, &self.token).await {
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
                                format!("{} has not confirmed all messages after {} s", B::NAME, waited.as_secs());
                            self.enter(State::WaitingForBroker { reason });
                        }
                    }
                }
            }
        };
        self.done = done;
        let Some(sent) = sent else { return Ok(false) };
        if sent.as_ref().is_err_and(B::is_refusal) {
            self.careful_until = self.careful_until.max(items.last().map(|item| item.id));
        }
        sent?;
        Ok(true)
    }

    fn note(&mut self, messages: u64, last: Option<EntryId>) {
        // Until it finds nothing new, it is as far behind as what it published last is old.
        let behind = last.map_or(0.0, age);
        self.last = last.or(self.last);
        metrics::output(Self::KIND, messages, behind);
        self.status.output(Self::KIND, |output| {
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
fn outgoing<B: Broker>(to: &B, item: &Item) -> impl Iterator<Item = Outgoing> {
    item.messages.iter().map(move |message| Outgoing {
        key: to.key(message),
        id: format!("{}/{}", item.id, message.index),
        body: message.text.to_vec(),
    })
}

/// Publishes the messages of these entries: all at once, or with `careful` one at a time, leaving out those already `done`.
async fn send<B: Broker>(
    to: &B,
    items: &[Item],
    careful: bool,
    done: &mut Option<(EntryId, usize)>,
    publisher: &mut B::Publisher,
) -> Result<(), B::Error> {
    if !careful {
        return B::publish(publisher, items.iter().flat_map(|item| outgoing(to, item)).collect()).await;
    }
    for item in items {
        let last = done.filter(|(id, _)| *id == item.id).map(|(_, index)| index);
        for (message, outgoing) in item.messages.iter().zip(outgoing(to, item)) {
            if last.is_some_and(|last| message.index <= last) {
                continue;
            }
            let id = outgoing.id.clone();
            match B::publish(publisher, vec![outgoing]).await {
                Err(reason) if B::is_final(&reason) => {
                    error!(id, did = message.did, %reason, "a message cannot be published to {}: it is left out", B::NAME);
                    metrics::count(metrics::OUTPUT_SKIPPED, 1);
                }
                published => published?,
            }
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
