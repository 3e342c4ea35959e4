//! What happens in the simulated network, in which order.
//!
//! State and bytes are kept apart: [`Network::step`] lets the next event happen, and [`frame::encode`] writes it down. A
//! consumer that resumes far along skips by stepping alone. Only records whose CID others may quote (posts, feed
//! generators) are encoded in a step. All chance of the state comes from one generator, and a record's own from a
//! number that the step drew, so that the state does not depend on what was written down. Of a network that signs, the
//! repositories follow what was written or skipped.

use std::collections::VecDeque;
use std::sync::Arc;

use super::accounts::{Account, Accounts, Status, StrongRef};
use super::chance::{skewed, young};
use super::frame::{self, Action, Content, Frame, Operation, Paper, Planned, What};
use super::key::Published;
use super::lie::{Lie, Lies};
use super::pool::{Live, Pool, Rkey};
use super::posts::{HOT, Post, Posts};
use super::record::{
    self, BLOCK, Draft, FOLLOW, GENERATOR, LABELER, LIKE, LIST, LIST_BLOCK, LIST_ITEM, POST, POSTGATE,
    PROFILE, REPOST, Reply, STARTER_PACK, THING, THREADGATE,
};
use super::repository::Repositories;
use super::{Late, NetworkOptions};

/// Frames per new account, which takes three itself.
const FRAMES_PER_ACCOUNT: u64 = 33;
/// These come first, so that there is somebody to talk to.
const FIRST_ACCOUNTS: u32 = 8;
/// Lists and feed generators that others can refer to.
const SHELF: usize = 64;
/// The farthest that the clock jumps, in microseconds: six hours.
const CLOCK_JUMP: i64 = 6 * 3600 * 1_000_000;
/// Handles that somebody had and nobody has.
const FREE_HANDLES: usize = 1000;

/// The frames of a simulated network, in order; an iterator that ends after `events` frames, or never.
#[expect(clippy::struct_excessive_bools, reason = "the options of a network")]
pub struct Network {
    rng: fastrand::Rng,
    accounts: Accounts,
    most_accounts: u32,
    spread: bool,
    events: u64,
    pad: usize,
    departures: bool,
    deletions: bool,
    clock_jumps: bool,
    signed: bool,
    new_keys: bool,

    repositories: Option<Repositories>,
    lies: Option<Lies>,
    /// Where changes of keys are made known.
    published: Option<Arc<Published>>,
    /// With what to begin again in the end, for what was not sent.
    restart: Option<Box<NetworkOptions>>,
    /// Which of that is sent.
    late: Late,
    /// After having begun again: the number of the last frame.
    again: Option<u64>,

    happened: u64,
    seq: u64,
    micros: i64,
    /// Skipped to, and not handed out yet.
    ahead: Option<Planned>,
    /// The frames with which a new account begins.
    beginnings: VecDeque<Beginning>,

    posts: Posts,
    likes: Pool,
    reposts: Pool,
    follows: Pool,
    blocks: Pool,
    others: Pool,
    generators: Vec<StrongRef>,
    lists: Vec<(u32, u64)>,
    /// Accounts that are not active and may come back.
    away: Vec<u32>,
    deleted: u32,
    free_handles: Vec<Box<str>>,
    handle_changes: u64,
}

enum Beginning {
    Account(u32),
    Profile(u32),
    /// The account's repository as it is, after something has changed around it.
    Sync(u32),
}

/// How a search for a cursor stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seek {
    Found,
    /// There are no more frames.
    End,
    /// Not yet.
    Further,
}

impl Iterator for Network {
    type Item = Frame;

    fn next(&mut self) -> Option<Frame> {
        loop {
            let planned = self.planned()?;
            let lie = match self.again {
                None => self.lie_about(&planned),
                Some(_) => None,
            };
            let frame = frame::encode(
                &planned,
                &mut Paper {
                    accounts: &self.accounts,
                    repositories: self.repositories.as_mut(),
                    lie,
                    pad: self.pad,
                },
            );
            self.forget_deleted(&planned);
            if lie != Some(Lie::Dropped) {
                return Some(frame);
            }
        }
    }
}

impl Network {
    /// The network before its first frame.
    #[must_use]
    pub fn new(options: &NetworkOptions) -> Self {
        Network {
            repositories: options.signed.then(|| Repositories::new(options.seed, false)),
            lies: Lies::new(options),
            restart: (options.late != Late::Nothing && options.events > 0).then(|| Box::new(options.clone())),
            ..Self::unwritten(options)
        }
    }

    /// The network before its first frame, with its repositories as a server keeps them.
    pub(super) fn with_records(options: &NetworkOptions) -> Self {
        Network { repositories: Some(Repositories::new(options.seed, true)), ..Self::unwritten(options) }
    }

    /// Makes changes of keys known there.
    pub(super) fn publishing(mut self, published: Arc<Published>) -> Self {
        self.published = Some(published);
        self
    }

    /// The network before its first event, of which nothing is written down.
    pub(super) fn unwritten(options: &NetworkOptions) -> Self {
        let most_accounts = options.accounts.max(1);
        let mut accounts = Accounts::new(options.seed);
        if options.spread {
            for _ in 0..most_accounts {
                accounts.add();
            }
        }
        Network {
            rng: fastrand::Rng::with_seed(options.seed),
            accounts,
            most_accounts,
            spread: options.spread,
            events: options.events,
            pad: options.pad,
            departures: options.departures,
            deletions: options.deletions,
            clock_jumps: options.clock_jumps,
            signed: options.signed,
            new_keys: options.signed && options.new_keys,
            repositories: None,
            lies: None,
            published: None,
            restart: None,
            late: options.late,
            again: None,
            happened: 0,
            seq: 0,
            micros: options.start.as_microsecond(),
            ahead: None,
            beginnings: VecDeque::new(),
            posts: Posts::new(),
            likes: Pool::new(100_000),
            reposts: Pool::new(30_000),
            follows: Pool::new(50_000),
            blocks: Pool::new(10_000),
            others: Pool::new(10_000),
            generators: Vec::new(),
            lists: Vec::new(),
            away: Vec::new(),
            deleted: 0,
            free_handles: Vec::new(),
            handle_changes: 0,
        }
    }

    /// Skips the frames whose `seq` is below `cursor`, without writing them down. False when no frame is left.
    pub fn seek(&mut self, cursor: u64) -> bool {
        loop {
            match self.seek_some(cursor, u64::MAX) {
                Seek::Found => return true,
                Seek::End => return false,
                Seek::Further => {}
            }
        }
    }

    /// Like [`Network::seek`], but gives up after this many frames and can then be called again.
    pub(super) fn seek_some(&mut self, cursor: u64, frames: u64) -> Seek {
        for _ in 0..frames {
            match self.planned() {
                None => return Seek::End,
                Some(planned) if planned.seq >= cursor => {
                    self.ahead = Some(planned);
                    return Seek::Found;
                }
                Some(planned) => self.skip(&planned),
            }
        }
        Seek::Further
    }

    fn lie_about(&self, planned: &Planned) -> Option<Lie> {
        self.lies.as_ref().and_then(|lies| lies.about(planned))
    }

    /// The next event to be sent or left out; in the end, those that were left out.
    fn planned(&mut self) -> Option<Planned> {
        if let Some(planned) = self.ahead.take() {
            return Some(planned);
        }
        loop {
            let Some(mut planned) = self.step() else {
                let options = self.restart.take()?;
                // Numbers of their own, whichever they are.
                let last = if self.late == Late::Creates { self.seq } else { 2 * self.seq };
                *self = Network { again: Some(last), restart: None, ..Network::new(&options) };
                continue;
            };
            let Some(last) = self.again else { return Some(planned) };
            let is_late = match (self.late, &planned.what) {
                (Late::Creates, What::Commit { operations, .. }) => {
                    operations.iter().all(|operation| matches!(operation.action, Action::Create(_)))
                }
                (late, _) => late == Late::Everything,
            };
            if is_late && self.lie_about(&planned) == Some(Lie::Dropped) {
                planned.seq = last + 1;
                self.again = Some(planned.seq);
                return Some(planned);
            }
            self.skip(&planned);
        }
    }

    /// What the repositories keep of an event that is not written down.
    fn skip(&mut self, planned: &Planned) {
        let Some(repositories) = &mut self.repositories else { return };
        match &planned.what {
            What::Commit { account, rev, operations, .. } => {
                let mut changes = frame::changes(operations, planned.micros, &self.accounts);
                repositories.change(*account, *rev, &mut changes);
            }
            What::Sync { account, rev } => repositories.change(*account, *rev, &mut []),
            What::Identity { .. } | What::Account { .. } => {}
        }
        self.forget_deleted(planned);
    }

    fn forget_deleted(&mut self, planned: &Planned) {
        if let (Some(repositories), What::Account { account, status, .. }) =
            (&mut self.repositories, &planned.what)
            && *status == Status::Deleted.name()
        {
            repositories.delete(*account);
        }
    }

    pub(super) fn repositories(&mut self) -> Option<(&mut Repositories, &Accounts)> {
        Some((self.repositories.as_mut()?, &self.accounts))
    }

    /// Lets the next event happen.
    pub(super) fn step(&mut self) -> Option<Planned> {
        if self.events != 0 && self.happened == self.events {
            return None;
        }
        self.happened += 1;
        self.seq += if self.one_in(50) { self.rng.u64(2..=4) } else { 1 };
        self.micros = self.micros.saturating_add(self.rng.i64(1..2000));
        if self.clock_jumps && self.one_in(300) {
            self.micros = self.micros.saturating_add(self.rng.i64(-CLOCK_JUMP..CLOCK_JUMP));
        }
        let what = match self.beginnings.pop_front() {
            Some(Beginning::Account(account)) => What::Account { account, active: true, status: None },
            Some(Beginning::Profile(account)) => self.profile(account),
            Some(Beginning::Sync(account)) => self.renewal(account),
            None if self.somebody_is_new() => self.arrival(),
            None => self.something(),
        };
        Some(Planned { seq: self.seq, micros: self.micros, what })
    }

    fn somebody_is_new(&self) -> bool {
        let present = self.accounts.len();
        present < self.most_accounts
            && (present < FIRST_ACCOUNTS || u64::from(present) * FRAMES_PER_ACCOUNT < self.happened)
    }

    fn arrival(&mut self) -> What {
        let account = self.accounts.add();
        self.beginnings.extend([Beginning::Account(account), Beginning::Profile(account)]);
        What::Identity { account, handle: Some(self.accounts.handle(account)) }
    }

    fn something(&mut self) -> What {
        let what = match self.rng.u32(0..1000) {
            0..503 => self.one(Self::like),
            503..506 => self.like_again(),
            506..626 => self.one(|network, owner| Some(network.post(owner))),
            626..706 => self.one(Self::repost),
            706..846 => self.one(Self::follow),
            846..856 => self.one(Self::block),
            856..936 => self.deletion(),
            936..951 => {
                let account = self.somebody();
                Some(self.profile(account))
            }
            951..956 => self.edit(),
            956..961 => Some(self.handle_change()),
            961..964 => Some(self.identity_again()),
            964..967 => self.status_change(),
            967..987 => self.other(),
            987..997 => self.several(),
            _ => self.sync(),
        };
        what.unwrap_or_else(|| {
            // Nobody found anything to do it to; a post is always possible.
            let account = self.somebody();
            let post = self.new_post(account, None);
            self.commit(account, vec![post])
        })
    }

    // Who and what

    /// An active account; unless they are alike, the earlier ones are busier.
    fn somebody(&mut self) -> u32 {
        let present = self.accounts.len();
        for _ in 0..8 {
            let one = if self.spread { self.rng.u32(0..present) } else { skewed(&mut self.rng, present, 2) };
            if self.accounts.is_active(one) {
                return one;
            }
        }
        // At least three in four are active.
        (0..present).find(|&one| self.accounts.is_active(one)).unwrap_or(0)
    }

    /// An account that others follow, mention, block; the first ones by far the most.
    fn somebody_known(&mut self) -> u32 {
        let present = self.accounts.len();
        young(&mut self.rng, u64::from(present)) as u32
    }

    /// The number of a post that people look at: one of the popular ones or one of the youngest. Mostly one that is
    /// still there.
    fn subject(&mut self) -> Option<u64> {
        let mut found = None;
        for _ in 0..6 {
            let number = self.posts.any_seen(&mut self.rng)?;
            found = Some(number);
            if self.posts.get(number)?.alive || self.one_in(12) {
                break;
            }
        }
        found
    }

    fn one_in(&mut self, times: u32) -> bool {
        self.rng.u32(0..times) == 0
    }

    fn draft(&mut self, draft: Draft) -> Content {
        Content::Draft(draft, self.rng.u64(..))
    }

    // Commits

    fn commit(&mut self, account: u32, operations: Vec<Operation>) -> What {
        let rev = self.accounts.next_tid(account, self.micros);
        let since = std::mem::replace(&mut self.accounts.get_mut(account).rev, rev);
        What::Commit { account, rev, since, operations }
    }

    /// A commit of one operation, by the first account that has something to apply it to.
    fn one(&mut self, operation: fn(&mut Self, u32) -> Option<Operation>) -> Option<What> {
        for _ in 0..6 {
            let account = self.somebody();
            if let Some(operation) = operation(self, account) {
                return Some(self.commit(account, vec![operation]));
            }
        }
        None
    }

    fn like(&mut self, owner: u32) -> Option<Operation> {
        if self.one_in(100) && !self.generators.is_empty() {
            let generator = self.generators[self.rng.usize(0..self.generators.len())];
            // Told apart from posts by the highest bit, which no post's number reaches.
            return self.new_like(owner, generator, generator.rkey | 1 << 63);
        }
        let number = self.subject()?;
        let post = self.posts.get(number)?.it;
        self.new_like(owner, post, number)
    }

    fn new_like(&mut self, owner: u32, it: StrongRef, subject: u64) -> Option<Operation> {
        if self.likes.contains(owner, LIKE, subject) {
            return None;
        }
        let rkey = self.accounts.next_tid(owner, self.micros);
        self.likes.insert(Live { owner, collection: LIKE, rkey: Rkey::Tid(rkey), subject });
        let content = self.draft(Draft::Like(it));
        Some(create(LIKE, rkey, content))
    }

    /// A second like of the same post by the same account, beside the first.
    fn like_again(&mut self) -> Option<What> {
        let (accounts, posts) = (&self.accounts, &self.posts);
        let at = self.likes.find(&mut self.rng, |live| {
            accounts.is_active(live.owner) && posts.get(live.subject).is_some()
        })?;
        let Live { owner, subject, .. } = self.likes.get(at);
        let post = self.posts.get(subject)?.it;
        let rkey = self.accounts.next_tid(owner, self.micros);
        self.likes.insert(Live { owner, collection: LIKE, rkey: Rkey::Tid(rkey), subject });
        let content = self.draft(Draft::Like(post));
        Some(self.commit(owner, vec![create(LIKE, rkey, content)]))
    }

    fn repost(&mut self, owner: u32) -> Option<Operation> {
        let subject = self.subject()?;
        let post = self.posts.get(subject)?.it;
        if self.reposts.contains(owner, REPOST, subject) {
            return None;
        }
        let rkey = self.accounts.next_tid(owner, self.micros);
        self.reposts.insert(Live { owner, collection: REPOST, rkey: Rkey::Tid(rkey), subject });
        let content = self.draft(Draft::Repost(post));
        Some(create(REPOST, rkey, content))
    }

    fn follow(&mut self, owner: u32) -> Option<Operation> {
        let subject = self.somebody_known();
        if subject == owner || self.follows.contains(owner, FOLLOW, subject.into()) {
            return None;
        }
        let rkey = self.accounts.next_tid(owner, self.micros);
        self.follows.insert(Live {
            owner,
            collection: FOLLOW,
            rkey: Rkey::Tid(rkey),
            subject: subject.into(),
        });
        let content = self.draft(Draft::Follow(subject));
        Some(create(FOLLOW, rkey, content))
    }

    fn block(&mut self, owner: u32) -> Option<Operation> {
        let subject = self.somebody_known();
        if subject == owner || self.blocks.contains(owner, BLOCK, subject.into()) {
            return None;
        }
        let rkey = self.accounts.next_tid(owner, self.micros);
        self.blocks.insert(Live { owner, collection: BLOCK, rkey: Rkey::Tid(rkey), subject: subject.into() });
        let content = self.draft(Draft::Block(subject));
        Some(create(BLOCK, rkey, content))
    }

    fn post(&mut self, owner: u32) -> Operation {
        let parent = if self.rng.u32(0..100) < 30 { self.subject() } else { None };
        self.new_post(owner, parent)
    }

    fn new_post(&mut self, owner: u32, parent: Option<u64>) -> Operation {
        let reply = parent.and_then(|parent| self.posts.get(parent)).map(Post::as_parent);
        let rkey = self.accounts.next_tid(owner, self.micros);
        let (bytes, cid) = self.post_content(reply);
        let it = StrongRef { owner, collection: POST, rkey, cid };
        let place = if self.one_in(8) { Some(self.rng.usize(0..HOT)) } else { None };
        self.posts.add(Post { it, reply, alive: true }, place);
        create(POST, rkey, Content::Block(bytes, cid))
    }

    fn post_content(&mut self, reply: Option<Reply>) -> (Vec<u8>, shrike::cbor::Cid) {
        let quote = if self.rng.u32(0..100) < 8 { self.subject() } else { None };
        let quote = quote.and_then(|quote| self.posts.get(quote)).map(|post| post.it);
        let mention = if self.one_in(10) { Some(self.somebody_known()) } else { None };
        record::encode(&Draft::Post { reply, quote, mention }, self.rng.u64(..), self.micros, &self.accounts)
    }

    /// A post of an active account that is still there.
    fn own_post(&mut self) -> Option<u64> {
        (0..8).find_map(|_| {
            let number = self.posts.any(&mut self.rng)?;
            let post = self.posts.get(number)?;
            (post.alive && self.accounts.is_active(post.it.owner)).then_some(number)
        })
    }

    /// A post that says something else from now on.
    fn edit(&mut self) -> Option<What> {
        let number = self.own_post()?;
        let Post { it, reply, .. } = *self.posts.get(number)?;
        let (bytes, cid) = self.post_content(reply);
        self.posts.get_mut(number)?.it.cid = cid;
        let action = Action::Update(Content::Block(bytes, cid));
        Some(self.commit(it.owner, vec![Operation { collection: POST, rkey: Rkey::Tid(it.rkey), action }]))
    }

    fn profile(&mut self, account: u32) -> What {
        let content = self.draft(Draft::Profile);
        let had_one = std::mem::replace(&mut self.accounts.get_mut(account).has_profile, true);
        let action = if had_one { Action::Update(content) } else { Action::Create(content) };
        self.commit(account, vec![Operation { collection: PROFILE, rkey: Rkey::Own, action }])
    }

    fn deletion(&mut self) -> Option<What> {
        if let 60..72 = self.rng.u32(0..80) {
            let number = self.own_post()?;
            let post = self.posts.get_mut(number)?;
            post.alive = false;
            let StrongRef { owner, rkey, .. } = post.it;
            return Some(self.commit(owner, vec![delete(POST, Rkey::Tid(rkey))]));
        }
        let pool = match self.rng.u32(0..68) {
            0..45 => &mut self.likes,
            45..60 => &mut self.follows,
            60..66 => &mut self.reposts,
            66 => &mut self.blocks,
            _ => &mut self.others,
        };
        let accounts = &self.accounts;
        let at = pool.find(&mut self.rng, |live| accounts.is_active(live.owner))?;
        let Live { owner, collection, rkey, .. } = pool.remove(at);
        Some(self.commit(owner, vec![delete(collection, rkey)]))
    }

    fn other(&mut self) -> Option<What> {
        let dice = self.rng.u32(0..100);
        if (60..78).contains(&dice) {
            return self.gate(if dice < 70 { THREADGATE } else { POSTGATE });
        }
        let owner = self.somebody();
        let list = match self.lists.len() {
            0 => None,
            count => Some(self.lists[self.rng.usize(0..count)]),
        };
        let operation = match (dice, list) {
            (25..52, Some(list)) => {
                let subject = self.somebody_known();
                self.own(list.0, LIST_ITEM, Draft::ListItem { list, subject })
            }
            (52..56, Some(list)) => self.own(owner, LIST_BLOCK, Draft::ListBlock { list }),
            (56..60, Some(list)) => self.own(list.0, STARTER_PACK, Draft::StarterPack { list }),
            (78..86, _) => return Some(self.new_generator(owner)),
            (86, _) => return Some(self.labeler(owner)),
            (87..100, _) => self.own(owner, THING, Draft::Thing),
            _ => self.own(owner, LIST, Draft::List),
        };
        let (owner, operation) = operation?;
        Some(self.commit(owner, vec![operation]))
    }

    /// A record of a kind that only its owner and its number identify.
    fn own(&mut self, owner: u32, collection: &'static str, draft: Draft) -> Option<(u32, Operation)> {
        if !self.accounts.is_active(owner) {
            return None;
        }
        let rkey = self.accounts.next_tid(owner, self.micros);
        if collection == LIST {
            let place = self.rng.usize(0..SHELF);
            shelve(&mut self.lists, place, (owner, rkey));
        }
        self.others.insert(Live { owner, collection, rkey: Rkey::Tid(rkey), subject: rkey });
        let content = self.draft(draft);
        Some((owner, create(collection, rkey, content)))
    }

    /// A rule about who may answer or quote a post, kept under the post's own key.
    fn gate(&mut self, collection: &'static str) -> Option<What> {
        let number = self.own_post()?;
        let StrongRef { owner, rkey, .. } = self.posts.get(number)?.it;
        if self.others.contains(owner, collection, rkey) {
            return None;
        }
        self.others.insert(Live { owner, collection, rkey: Rkey::Tid(rkey), subject: rkey });
        let post = (owner, rkey);
        let draft =
            if collection == THREADGATE { Draft::Threadgate { post } } else { Draft::Postgate { post } };
        let content = self.draft(draft);
        Some(self.commit(owner, vec![create(collection, rkey, content)]))
    }

    fn new_generator(&mut self, owner: u32) -> What {
        let rkey = self.accounts.next_tid(owner, self.micros);
        let (bytes, cid) = record::encode(&Draft::Generator, self.rng.u64(..), self.micros, &self.accounts);
        let place = self.rng.usize(0..SHELF);
        shelve(&mut self.generators, place, StrongRef { owner, collection: GENERATOR, rkey, cid });
        self.others.insert(Live { owner, collection: GENERATOR, rkey: Rkey::Tid(rkey), subject: rkey });
        self.commit(owner, vec![create(GENERATOR, rkey, Content::Block(bytes, cid))])
    }

    fn labeler(&mut self, owner: u32) -> What {
        let content = self.draft(Draft::Labeler);
        let action = if self.others.contains(owner, LABELER, 0) {
            Action::Update(content)
        } else {
            self.others.insert(Live { owner, collection: LABELER, rkey: Rkey::Own, subject: 0 });
            Action::Create(content)
        };
        self.commit(owner, vec![Operation { collection: LABELER, rkey: Rkey::Own, action }])
    }

    /// A commit of 2 to 50 operations, or of 200, which is the most that there may be.
    fn several(&mut self) -> Option<What> {
        let many = if self.one_in(20) { 200 } else { 2 + young(&mut self.rng, 49) as usize };
        let mut operations = Vec::with_capacity(many);
        let mut owner = self.somebody();
        if self.one_in(3) {
            // A like taken back and given again, in one commit.
            let (accounts, posts) = (&self.accounts, &self.posts);
            let at = self.likes.find(&mut self.rng, |live| {
                accounts.is_active(live.owner) && posts.get(live.subject).is_some()
            })?;
            let live = self.likes.remove(at);
            owner = live.owner;
            operations.push(delete(LIKE, live.rkey));
            let it = self.posts.get(live.subject)?.it;
            operations.extend(self.new_like(owner, it, live.subject));
        }
        // A thread of one's own posts.
        let is_thread = many < 20 && self.one_in(4);
        while operations.len() < many {
            let operation = if is_thread {
                let before = self.posts.youngest().filter(|&post| {
                    !operations.is_empty() && self.posts.get(post).is_some_and(|post| post.it.owner == owner)
                });
                Some(self.new_post(owner, before))
            } else {
                // Several tries, because somebody who does so much has done much of it before.
                (0..4).find_map(|_| match self.rng.u32(0..10) {
                    0..4 => self.like(owner),
                    4..8 => self.follow(owner),
                    8 => self.repost(owner),
                    _ => Some(self.post(owner)),
                })
            };
            let operation = match operation {
                Some(operation) => operation,
                None => self.own(owner, THING, Draft::Thing)?.1,
            };
            operations.push(operation);
        }
        Some(self.commit(owner, operations))
    }

    // Accounts

    /// Another handle: a new one, or one that somebody else had before.
    fn handle_change(&mut self) -> What {
        let account = self.somebody();
        let handle = if !self.free_handles.is_empty() && self.one_in(4) {
            let at = self.rng.usize(0..self.free_handles.len());
            self.free_handles.swap_remove(at)
        } else {
            self.handle_changes += 1;
            format!("user{account}-{}.test", self.handle_changes).into_boxed_str()
        };
        let before = self.accounts.handle(account).into_boxed_str();
        self.accounts.get_mut(account).handle = Some(handle);
        if self.free_handles.len() < FREE_HANDLES {
            self.free_handles.push(before);
        }
        What::Identity { account, handle: Some(self.accounts.handle(account)) }
    }

    /// An identity event that says nothing new, or less than was known.
    fn identity_again(&mut self) -> What {
        let account = self.somebody();
        if self.new_keys && self.accounts.get(account).rev > 0 && self.one_in(3) {
            return self.new_key(account);
        }
        let handle = match self.rng.u32(0..100) {
            0..25 => None,
            25..40 => Some("handle.invalid".to_owned()),
            _ => Some(self.accounts.handle(account)),
        };
        What::Identity { account, handle }
    }

    /// The account signs with another key from now on. Like a real server, this one sends the repository under a new
    /// revision afterwards.
    fn new_key(&mut self, account: u32) -> What {
        if let Some(repositories) = &mut self.repositories {
            repositories.change_key(account);
            if let Some(published) = &self.published {
                published.changed(account, repositories.changes_of_key(account));
            }
        }
        self.beginnings.push_back(Beginning::Sync(account));
        What::Identity { account, handle: Some(self.accounts.handle(account)) }
    }

    fn status_change(&mut self) -> Option<What> {
        let away = self.away.len() as u32;
        let too_many = (away + self.deleted + 1) * 4 > self.accounts.len();
        let dice = self.rng.u32(0..100);
        if dice >= 95 && self.departures {
            // Its server has trouble; the account is active all the same.
            let account = self.somebody();
            let status = if self.rng.bool() { "throttled" } else { "desynchronized" };
            return Some(What::Account { account, active: true, status: Some(status) });
        }
        if away > 0 && (too_many || dice < 45) {
            let at = self.rng.usize(0..self.away.len());
            let account = self.away.swap_remove(at);
            self.accounts.get_mut(account).status = Status::Active;
            if self.signed && self.accounts.get(account).rev > 0 {
                self.beginnings.push_back(Beginning::Sync(account));
            }
            return Some(What::Account { account, active: true, status: None });
        }
        if too_many || !self.departures {
            return None;
        }
        let account = self.somebody();
        let status = match self.rng.u32(0..100) {
            0..4 => Status::Takendown,
            4..8 => Status::Suspended,
            8..28 if self.deletions => Status::Deleted,
            _ => Status::Deactivated,
        };
        let it: &mut Account = self.accounts.get_mut(account);
        it.status = status;
        if status == Status::Deleted {
            self.deleted += 1;
        } else {
            self.away.push(account);
        }
        Some(What::Account { account, active: false, status: status.name() })
    }

    fn sync(&mut self) -> Option<What> {
        let account = self.somebody();
        let rev = self.accounts.get(account).rev;
        (!self.signed || rev > 0).then_some(What::Sync { account, rev })
    }

    /// The repository as it is, under a new revision.
    fn renewal(&mut self, account: u32) -> What {
        let rev = self.accounts.next_tid(account, self.micros);
        self.accounts.get_mut(account).rev = rev;
        What::Sync { account, rev }
    }
}

fn create(collection: &'static str, rkey: u64, content: Content) -> Operation {
    Operation { collection, rkey: Rkey::Tid(rkey), action: Action::Create(content) }
}

fn delete(collection: &'static str, rkey: Rkey) -> Operation {
    Operation { collection, rkey, action: Action::Delete }
}

/// Puts something in one of the places of a shelf that fills up first.
fn shelve<T>(shelf: &mut Vec<T>, place: usize, it: T) {
    if shelf.len() < SHELF {
        shelf.push(it);
    } else {
        shelf[place] = it;
    }
}
