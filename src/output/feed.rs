//! The settled entries, read once for all subscribers that keep up. A subscriber that is behind reads the stream itself until it
//! has caught up.

use std::borrow::Borrow;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::{Notify, Semaphore, watch};
use tracing::warn;

use super::messages::{Item, Messages, Pages};
use super::{events, jetstream};
use crate::event::EntryId;
use crate::mutex::lock;
use crate::status::SubscribersReport;
use crate::store::Store;
use crate::stream::settled::Place;
use crate::stream::{Redis, Stream};
use crate::time::{Backoff, now_ms};

/// The most bytes of messages that are kept for those who keep up.
const RING_BYTES: usize = 4 << 20;
/// How many bytes a subscriber takes at a time.
const TAKE_BYTES: usize = 256 << 10;
/// How many subscribers that are behind read the stream at a time, so that many of them do not hold up everybody else.
const REPLAYS: usize = 4;
/// The time between two looks while nothing is new.
const LOOK: Duration = Duration::from_millis(20);
/// Failures are logged again after this time.
const SAY_AGAIN: Duration = Duration::from_mins(1);

/// The newest items: all those after `start`.
#[derive(Default)]
struct Ring {
    /// How often it was emptied. It may lack what came in between, so a subscriber of an earlier generation has to read the stream.
    generation: u64,
    /// `None` before anything is known.
    start: Option<EntryId>,
    items: VecDeque<Arc<Item>>,
    bytes: usize,
}

impl Ring {
    fn push(&mut self, item: Arc<Item>) {
        self.bytes += item.bytes();
        self.items.push_back(item);
        while self.bytes > RING_BYTES {
            let Some(oldest) = self.items.pop_front() else { return };
            self.bytes -= oldest.bytes();
            self.start = Some(oldest.id);
        }
    }

    /// The items after this one; `None` if some of them may not be here.
    fn after(&self, id: EntryId, generation: u64) -> Option<Vec<Arc<Item>>> {
        if generation != self.generation || self.start.is_none_or(|start| id < start) {
            return None;
        }
        let from = self.items.partition_point(|item| item.id <= id);
        let mut bytes = 0;
        let fits = |item: &&Arc<Item>| {
            let is_first = bytes == 0;
            bytes += item.bytes();
            is_first || bytes <= TAKE_BYTES
        };
        Some(self.items.iter().skip(from).take_while(fits).cloned().collect())
    }
}

/// How far each subscriber has got, by a number of its own; `None` before its first item.
#[derive(Default)]
struct Subscribers {
    next: u64,
    places: HashMap<u64, Option<EntryId>>,
}

/// What the subscribers of this process read.
pub struct Feed {
    redis: Redis,
    messages: Messages,
    ring: Mutex<Ring>,
    /// Changes whenever there is something new.
    news: watch::Sender<u64>,
    subscribers: Mutex<Subscribers>,
    first: Notify,
    replays: Semaphore,
}

impl Feed {
    /// A feed that nobody reads yet.
    #[must_use]
    pub fn new(redis: Redis, store: Store) -> Self {
        Self {
            redis,
            messages: Messages::new(store),
            ring: Mutex::default(),
            news: watch::Sender::new(0),
            subscribers: Mutex::default(),
            first: Notify::new(),
            replays: Semaphore::new(REPLAYS),
        }
    }

    /// Reads for as long as it is polled, while there are subscribers.
    pub async fn run(&self) {
        let mut delays = Backoff::default();
        let mut failed: Option<Instant> = None;
        loop {
            while !self.is_read() {
                self.empty_ring();
                self.first.notified().await;
            }
            // Subscribers stay connected, and continue as soon as Redis and PostgreSQL answer.
            if let Err(error) = self.follow(&mut delays).await {
                self.empty_ring();
                let now = Instant::now();
                if failed.is_none_or(|at| now.duration_since(at) >= SAY_AGAIN) {
                    failed = Some(now);
                    warn!(reason = format!("{error:#}"), "subscribers get nothing at the moment");
                }
                tokio::time::sleep(delays.pause()).await;
            }
        }
    }

    fn empty_ring(&self) {
        {
            let mut ring = lock(&self.ring);
            *ring = Ring { generation: ring.generation + 1, ..Ring::default() };
        }
        self.news.send_modify(|count| *count += 1);
    }

    fn is_read(&self) -> bool {
        !lock(&self.subscribers).places.is_empty()
    }

    /// How many subscribers there are, and how far they are.
    #[must_use]
    pub fn report(&self) -> SubscribersReport {
        let newest = {
            let ring = lock(&self.ring);
            ring.items.back().map(|item| item.id).or(ring.start)
        };
        let subscribers = lock(&self.subscribers);
        let furthest = subscribers.places.values().flatten().min();
        let behind = newest.zip(furthest).map_or(0, |(newest, place)| newest.ms.saturating_sub(place.ms));
        SubscribersReport {
            connected: subscribers.places.len() as u64,
            furthest_behind_seconds: behind as f64 / 1000.0,
        }
    }

    async fn follow(&self, delays: &mut Backoff) -> Result<()> {
        let mut stream = self.redis.connect().await?;
        let mut place = Place::Now;
        let mut pages = Pages::default();
        // The entry after which the ring begins; until it is passed, numbers may be too small.
        let mut start: Option<EntryId> = None;
        while self.is_read() {
            let begins = place == Place::Now;
            let items = self.read(&mut stream, &mut place, &mut pages).await?;
            let is_lost = |items: &Vec<Item>| match start {
                Some(start) => items.is_empty() || skips(items, start),
                None => false,
            };
            let Some(mut items) = items.filter(|items| !is_lost(items)) else {
                // Those who have read up to here find out by themselves.
                (place, pages, start) = (Place::Now, Pages::default(), None);
                self.empty_ring();
                tokio::time::sleep(LOOK).await;
                continue;
            };
            delays.reset();
            if let (true, Place::Read(id)) = (begins, place) {
                start = Some(id);
                place = Place::Behind(events::run_up(id));
                continue;
            }
            if let Some(id) = start {
                let passed = items.last().is_some_and(|last| last.id >= id);
                items.retain(|item| item.id > id);
                if !passed {
                    continue;
                }
                start = None;
                lock(&self.ring).start = Some(id);
            }
            let is_empty = items.is_empty();
            {
                let mut ring = lock(&self.ring);
                // Nothing was there at the beginning.
                if let (None, Place::Read(id) | Place::Behind(id)) = (ring.start, place) {
                    ring.start = Some(id);
                }
                for item in items {
                    ring.push(Arc::new(item));
                }
            }
            if is_empty {
                tokio::time::sleep(LOOK).await;
            } else {
                self.news.send_modify(|count| *count += 1);
            }
        }
        Ok(())
    }

    /// The next items from the stream; `None` if some are no longer there.
    async fn read(
        &self,
        stream: &mut Stream,
        place: &mut Place,
        pages: &mut Pages,
    ) -> Result<Option<Vec<Item>>> {
        let Some(page) = stream.settled(place, pages.count()).await? else { return Ok(None) };
        pages.note(&page);
        Ok(Some(self.messages.of(&page, pages).await?))
    }
}

/// Whether these items go past an entry without it: others may be gone, too.
fn skips<I: Borrow<Item>>(items: &[I], entry: EntryId) -> bool {
    let goes_past = items.last().is_some_and(|last| last.borrow().id >= entry);
    goes_past && !items.iter().any(|item| item.borrow().id == entry)
}

/// Why a subscriber gets nothing more.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// What comes after the last one that it got is no longer in the stream.
    #[error(
        "further behind than the stream keeps (STREAM_KEEP): after reconnecting, some events are missing"
    )]
    Behind,
}

/// Where a subscriber begins that needs numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Begun {
    /// It gets no messages with lower numbers.
    pub from: u64,
    /// What it should know.
    pub notice: Option<Notice>,
}

/// Why a subscriber begins somewhere else than it asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// What comes right after the cursor is no longer in the stream, or was never there.
    OutdatedCursor,
    /// The cursor is in the future.
    FutureCursor,
}

/// One subscriber's place in the feed.
pub struct Subscriber {
    number: u64,
    feed: Arc<Feed>,
    place: Place,
    /// Whether it needs the numbers of messages.
    numbered: bool,
    /// It gets only what comes after this entry, which it has not passed yet.
    after: Option<EntryId>,
    /// The ring's generation when it last looked in the stream.
    generation: u64,
    news: watch::Receiver<u64>,
    stream: Option<Stream>,
    pages: Pages,
    delays: Backoff,
}

impl Subscriber {
    /// Begins at a cursor in microseconds, or with what is settled from now on.
    #[must_use]
    pub fn new(feed: Arc<Feed>, cursor: Option<u64>) -> Self {
        let news = feed.news.subscribe();
        let number = {
            let mut subscribers = lock(&feed.subscribers);
            subscribers.next += 1;
            let number = subscribers.next;
            subscribers.places.insert(number, None);
            number
        };
        feed.first.notify_one();
        let place = cursor.map_or(Place::Now, |cursor| Place::Behind(jetstream::before_cursor(cursor)));
        Self {
            number,
            feed,
            place,
            numbered: false,
            after: None,
            generation: 0,
            news,
            stream: None,
            pages: Pages::default(),
            delays: Backoff::default(),
        }
    }

    /// Begins early enough for the numbers of messages to be right: at this one, or with what is settled from now on. Waits until
    /// Redis answers.
    pub async fn begin(&mut self, cursor: Option<u64>) -> Begun {
        self.numbered = true;
        self.place = Place::Now;
        let Some(cursor) = cursor else { return Begun::default() };
        loop {
            match self.find(cursor).await {
                Ok(begun) => return begun,
                Err(_) => tokio::time::sleep(self.delays.pause()).await,
            }
        }
    }

    async fn find(&mut self, cursor: u64) -> Result<Begun> {
        let feed = Arc::clone(&self.feed);
        let mut stream = feed.redis.reuse(&mut self.stream).await?;
        let tip = stream.last_entry(None).await?.unwrap_or_default();
        let wanted = jetstream::before_cursor(cursor);
        let begun = if events::run_up(wanted) > tip {
            let notice = match tip {
                _ if wanted.ms > now_ms() => Some(Notice::FutureCursor),
                // Whatever there was is gone.
                EntryId { ms: 0, .. } => Some(Notice::OutdatedCursor),
                _ => None,
            };
            Begun { from: 0, notice }
        } else {
            let early = events::run_up(wanted.min(tip));
            let anchor = stream.last_entry(Some(early)).await?;
            self.place = anchor.map_or(Place::Behind(early), Place::Read);
            match anchor {
                Some(_) => Begun { from: cursor, notice: None },
                None if stream.is_whole().await? => Begun { from: cursor, notice: None },
                None => Begun { from: 0, notice: Some(Notice::OutdatedCursor) },
            }
        };
        self.stream = Some(stream);
        self.delays.reset();
        Ok(begun)
    }

    /// The next items; at least one. Waits until there is one.
    ///
    /// # Errors
    ///
    /// [`Ended`].
    pub async fn next(&mut self) -> Result<Vec<Arc<Item>>, Ended> {
        loop {
            let mut items = self.wait().await?;
            if let Some(after) = self.after {
                if skips(&items, after) {
                    return Err(Ended::Behind);
                }
                if items.last().is_some_and(|last| last.id >= after) {
                    self.after = None;
                }
                items.retain(|item| item.id > after);
            }
            if let Some(last) = items.last() {
                lock(&self.feed.subscribers).places.insert(self.number, Some(last.id));
                return Ok(items);
            }
        }
    }

    async fn wait(&mut self) -> Result<Vec<Arc<Item>>, Ended> {
        loop {
            self.news.borrow_and_update();
            let ready = match self.place {
                Place::Read(id) | Place::Behind(id) => lock(&self.feed.ring).after(id, self.generation),
                Place::Now => None,
            };
            match ready {
                Some(items) => {
                    self.stream = None;
                    if let Some(last) = items.last() {
                        self.place = Place::Read(last.id);
                        self.pages.continue_at(last.numbers.end);
                        return Ok(items);
                    }
                    // The feed never ends before its subscribers.
                    let _ = self.news.changed().await;
                }
                None => match self.read().await {
                    Ok(Some(items)) if items.is_empty() => tokio::time::sleep(LOOK).await,
                    Ok(Some(items)) => return Ok(items.into_iter().map(Arc::new).collect()),
                    Ok(None) => return Err(Ended::Behind),
                    Err(_) => tokio::time::sleep(self.delays.pause()).await,
                },
            }
        }
    }

    async fn read(&mut self) -> Result<Option<Vec<Item>>> {
        let feed = Arc::clone(&self.feed);
        let _turn = feed.replays.acquire().await?;
        let mut stream = self.feed.redis.reuse(&mut self.stream).await?;
        let mut place = self.place;
        let generation = lock(&self.feed.ring).generation;
        let items = self.feed.read(&mut stream, &mut place, &mut self.pages).await?;
        if let (true, Place::Now, Place::Read(id)) = (self.numbered, self.place, place) {
            self.after = Some(id);
            place = Place::Behind(events::run_up(id));
        }
        self.place = place;
        self.generation = generation;
        self.stream = Some(stream);
        self.delays.reset();
        Ok(items)
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        lock(&self.feed.subscribers).places.remove(&self.number);
    }
}
