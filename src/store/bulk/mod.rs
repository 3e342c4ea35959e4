//! The bulk path: many events in one transaction, with one look at what is there, and plain inserts.
//!
//! 1. Accounts that may be new get a row, in a transaction of its own.
//! 2. The transaction locks the partitions of its accounts: nobody else writes for any of them.
//! 3. One look finds records that have a row or a tombstone, accounts that opted out or were deleted, posts with gates.
//! 4. Deletes and new records are written column by column, one statement per table. Of several operations on one record
//!    only the newest is written. What the look found is left to `standpipe.change`, in the same transaction.
//! 5. The changes of counters of both are summed up and written last, in the order of their keys.
//!
//! Events that have to do with gates, feed generators or labelers are left to the caller, because they need locks of
//! their own. A gate may still be committed while posts that it applies to are: both sides look again (`judge`).

mod claims;
mod columns;
mod judge;
mod others;
mod sorted;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};

use futures_util::future::{join, join_all};
use postgres_types::ToSql;
use tokio_postgres::Row;

use super::batch::{Outcome, outcome, too_few};
use super::call::{SqlOp, kind_of};
use super::verdict::Verdict;
use super::{Session, StoreError};
use crate::crash::{self, Point};
use crate::event::{Event, Kind, Op};
use crate::metrics;
use columns::{Columns, Labels, Statuses, Tables, Versions};
use sorted::{Found, Sorted, Way};

/// Events that are written together after one of a batch was refused.
const PART: usize = 100;

/// A query's parameters.
type Parameters<'p> = &'p [&'p (dyn ToSql + Sync)];

/// Changes of counters by post: likes, reposts, replies, quotes, bookmarks.
type Deltas<'e> = BTreeMap<Cow<'e, str>, [i32; 5]>;

impl Session {
    /// Applies events in one transaction: all of them or none, except those that get no outcome, of which nothing is
    /// applied. The outcomes are in the order of the events.
    ///
    /// Nothing is durable before [`Session::flush`] has answered on this same connection.
    ///
    /// # Errors
    ///
    /// None of the events was applied. Unless the verdict is [`super::Verdict::Reconnect`], they can be tried one by one.
    pub(super) async fn bulk(&self, events: &[&Event<'_>]) -> Result<Vec<Option<Outcome>>, StoreError> {
        let mut sorted = Sorted::new(events);
        if sorted.is_empty() {
            return Ok(vec![None; events.len()]);
        }
        self.note_epochs(events).await?;
        self.add_users(&sorted).await?;
        let done = self.write(&mut sorted).await;
        // COMMIT also ends a failed transaction, by rolling it back.
        let end = if done.is_ok() { "COMMIT" } else { "ROLLBACK" };
        let ended = self.in_time(self.client.batch_execute(end)).await;
        let outcomes = done?;
        ended?;
        crash::at(Point::BeforeJudging);
        self.judge_posts(&sorted.applied()).await?;
        Ok(outcomes)
    }

    /// Accounts that may be new.
    async fn add_users(&self, sorted: &Sorted<'_, '_>) -> Result<(), StoreError> {
        let dids = sorted.new_accounts(&self.known);
        if !dids.is_empty() {
            self.ask(include_str!("../../../sql/bulk/users.sql"), &[&dids]).await?;
        }
        Ok(())
    }

    /// Everything between BEGIN and COMMIT.
    async fn write(&self, sorted: &mut Sorted<'_, '_>) -> Result<Vec<Option<Outcome>>, StoreError> {
        let repos = sorted.repos();
        let (began, locked) = join(
            self.in_time(self.client.batch_execute("BEGIN")),
            self.ask(include_str!("../../../sql/bulk/lock.sql"), &[&repos]),
        )
        .await;
        began?;
        locked?;
        sorted.settle(&self.look(sorted).await?);
        let sorted = &*sorted;
        let mut deltas = Deltas::new();
        self.in_time(self.client.batch_execute("SAVEPOINT part")).await?;
        let outcomes = match self.write_part(sorted, &repos, &mut deltas).await {
            Err(error) if error.verdict == Verdict::Reject => {
                metrics::retry("split");
                deltas.clear();
                self.write_parts(sorted, &repos, &mut deltas).await?
            }
            written => written?,
        };
        self.count(&deltas).await?;
        Ok(outcomes)
    }

    /// Something in the batch is refused: writes it in parts. Those that are refused get no outcomes.
    async fn write_parts<'e>(
        &self,
        sorted: &Sorted<'e, '_>,
        repos: &[&str],
        deltas: &mut Deltas<'e>,
    ) -> Result<Vec<Option<Outcome>>, StoreError> {
        let mut outcomes = Vec::new();
        self.in_time(self.client.batch_execute("ROLLBACK TO part")).await?;
        for part in sorted.parts(PART) {
            let mut own = Deltas::new();
            match self.write_part(&part, repos, &mut own).await {
                Ok(done) => {
                    outcomes.extend(done);
                    for (post, delta) in own {
                        add(deltas, post, delta);
                    }
                    self.in_time(self.client.batch_execute("RELEASE part; SAVEPOINT part")).await?;
                }
                Err(error) if error.verdict == Verdict::Reject => {
                    outcomes.resize(outcomes.len() + part.len(), None);
                    self.in_time(self.client.batch_execute("ROLLBACK TO part")).await?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(outcomes)
    }

    /// Writes events, but for the counters.
    async fn write_part<'e>(
        &self,
        sorted: &Sorted<'e, '_>,
        repos: &[&str],
        deltas: &mut Deltas<'e>,
    ) -> Result<Vec<Option<Outcome>>, StoreError> {
        let mut done = self.delete(sorted, deltas).await?;
        done.extend(self.registers(sorted).await?);
        done.extend(self.plain(sorted).await?);
        let others = self.others(sorted).await?;
        let settled = (!others.present.is_empty()).then(|| sorted.without(&others.present));
        let sorted = settled.as_ref().unwrap_or(sorted);
        let tables = Tables::of(sorted, &others.counted, deltas);
        let careful = Careful::of(sorted);
        self.insert(&tables).await?;
        let changed = self.change(repos, &careful).await?;
        for (uri, delta) in changed.deltas {
            add(deltas, Cow::Owned(uri), delta);
        }
        outcomes(sorted, &done, &changed.applied)
    }

    /// What is there already.
    async fn look(&self, sorted: &Sorted<'_, '_>) -> Result<Found, StoreError> {
        let keys = sorted.keys();
        let rows = self
            .ask(
                include_str!("../../../sql/bulk/look.sql"),
                &[&keys.accounts, &keys.written, &keys.follows, &keys.posts, &keys.gates],
            )
            .await?;
        let row = rows.first().ok_or_else(too_few)?;
        let set = |index| row.get::<_, Vec<String>>(index).into_iter().collect();
        let swept: Vec<String> = row.get(3);
        let swept = swept.iter().filter_map(|pair| pair.split_once(' '));
        Ok(Found {
            accounts: set(0),
            records: set(1),
            gates: set(2),
            swept: swept.map(|(did, rev)| (did.to_owned(), rev.to_owned())).collect(),
            has_epochs: row.get(4),
        })
    }

    /// Deletes records, with a tombstone for each. Returns the URIs of those that were there.
    async fn delete<'e>(
        &self,
        sorted: &Sorted<'e, '_>,
        deltas: &mut Deltas<'e>,
    ) -> Result<HashSet<String>, StoreError> {
        let of = |kind: Option<Kind>| {
            Versions::of(sorted.going(Way::Delete).filter(|(_, op)| kind.is_none_or(|kind| op.kind == kind)))
        };
        let [all, likes, reposts, follows, posts] =
            [None, Some(Kind::Like), Some(Kind::Repost), Some(Kind::Follow), Some(Kind::Post)].map(of);
        if all.is_empty() {
            return Ok(HashSet::new());
        }
        let asked = vec![
            (include_str!("../../../sql/bulk/delete_likes.sql"), likes.parameters()),
            (include_str!("../../../sql/bulk/delete_reposts.sql"), reposts.parameters()),
            (include_str!("../../../sql/bulk/delete_follows.sql"), follows.parameters()),
            (include_str!("../../../sql/bulk/delete_posts.sql"), posts.parameters()),
            (include_str!("../../../sql/bulk/tombstones.sql"), all.parameters()),
        ];
        let answers: [Vec<Row>; 5] = self.ask_all(asked).await?.try_into().map_err(|_| too_few())?;
        let [likes, reposts, follows, posts, _] = answers;
        let mut deleted: HashSet<String> = HashSet::new();
        for (rows, counter) in [(likes, 0), (reposts, 1)] {
            let mut pairs: HashSet<(String, String)> = HashSet::new();
            for row in rows {
                deleted.insert(row.get(0));
                let pair: (String, String) = (row.get(1), row.get(2));
                let another: bool = row.get(3);
                if !another && pairs.insert(pair.clone()) {
                    let mut delta = [0; 5];
                    delta[counter] = -1;
                    add(deltas, Cow::Owned(pair.0), delta);
                }
            }
        }
        deleted.extend(follows.iter().map(|row| row.get::<_, String>(0)));
        for row in posts {
            deleted.insert(row.get(0));
            for (column, delta) in [(1, [0, 0, -1, 0, 0]), (2, [0, 0, 0, -1, 0])] {
                if let Some(uri) = row.get::<_, Option<String>>(column) {
                    add(deltas, Cow::Owned(uri), delta);
                }
            }
        }
        Ok(deleted)
    }

    /// Writes profiles and statuses. Returns the URIs of those that are newer than what was there.
    async fn registers(&self, sorted: &Sorted<'_, '_>) -> Result<HashSet<String>, StoreError> {
        let of = |kind| sorted.going(Way::Register).filter(move |(_, op)| op.kind == kind);
        let profiles = Versions::of_registers(of(Kind::Profile));
        let statuses = Statuses::of(of(Kind::Account));
        let asked = vec![
            (include_str!("../../../sql/bulk/profiles.sql"), profiles.parameters()),
            (include_str!("../../../sql/bulk/statuses.sql"), statuses.parameters()),
        ];
        let [profiles, statuses]: [Vec<Row>; 2] =
            self.ask_all(asked).await?.try_into().map_err(|_| too_few())?;
        let set = |rows: Vec<Row>| rows.iter().map(|row| row.get(0)).collect::<HashSet<String>>();
        let (profiles, statuses) = (set(profiles), set(statuses));
        let new = |kind, dids: &HashSet<String>| {
            of(kind).filter(|(event, _)| dids.contains(&*event.repo)).collect::<Vec<_>>()
        };
        let (profiles, statuses) = (new(Kind::Profile, &profiles), new(Kind::Account, &statuses));
        let dids = |ops: &[(&Event<'_>, &Op<'_>)]| -> Vec<String> {
            ops.iter().map(|(event, _)| event.repo.to_string()).collect()
        };
        if !profiles.is_empty() {
            let bodies: Vec<_> = profiles.iter().map(|(_, op)| op.json()).collect();
            let labels = Labels::of_profiles(&profiles);
            let sql = include_str!("../../../sql/bulk/show_profiles.sql");
            self.ask(sql, &[&dids(&profiles), &bodies, labels.uris()]).await?;
            self.ask_all(vec![(include_str!("../../../sql/bulk/labels.sql"), labels.parameters())]).await?;
        }
        if !statuses.is_empty() {
            let active: Vec<bool> =
                statuses.iter().map(|(_, op)| op.json().is_some_and(|body| body.0 == "true")).collect();
            let status: Vec<_> = statuses.iter().map(|(_, op)| op.subject.as_deref()).collect();
            let sql = include_str!("../../../sql/bulk/show_statuses.sql");
            self.ask(sql, &[&dids(&statuses), &active, &status]).await?;
        }
        Ok(profiles.iter().chain(&statuses).map(|(_, op)| op.uri.clone()).collect())
    }

    /// Writes records of plain kinds, and deletes others. Returns the URIs of those that changed.
    async fn plain(&self, sorted: &Sorted<'_, '_>) -> Result<HashSet<String>, StoreError> {
        let mut changed = HashSet::new();
        for (kind, ops) in sorted.plain() {
            let ops: Vec<SqlOp<'_>> = ops.iter().map(|(event, op)| SqlOp::of(event, op)).collect();
            let rows = self.ask(include_str!("../../../sql/bulk/plain.sql"), &[&kind, &ops]).await?;
            let uris: Option<Vec<String>> = rows.first().ok_or_else(too_few)?.get(0);
            changed.extend(uris.unwrap_or_default());
        }
        Ok(changed)
    }

    /// Writes new records.
    async fn insert(&self, tables: &Tables<'_>) -> Result<(), StoreError> {
        self.ask_all(tables.statements()).await.map(drop)
    }

    /// Applies all other operations, one by one.
    async fn change(&self, repos: &[&str], careful: &Careful<'_>) -> Result<Changed, StoreError> {
        if careful.ops.is_empty() {
            return Ok(Changed::default());
        }
        let sql = include_str!("../../../sql/bulk/change.sql");
        let rows = self.ask(sql, &[&repos, &careful.ops, &careful.kinds]).await?;
        let row = rows.first().ok_or_else(too_few)?;
        let applied: Vec<bool> = row.get(0);
        if applied.len() != careful.ops.len() {
            return Err(too_few());
        }
        let columns: [Vec<i32>; 5] = std::array::from_fn(|column| row.get(column + 2));
        let posts: Vec<String> = row.get(1);
        let deltas = posts.into_iter().enumerate();
        Ok(Changed {
            applied,
            deltas: deltas
                .map(|(index, post)| (post, columns.each_ref().map(|column| column[index])))
                .collect(),
        })
    }

    /// Changes counters.
    async fn count(&self, deltas: &Deltas<'_>) -> Result<(), StoreError> {
        if deltas.is_empty() {
            return Ok(());
        }
        let posts: Vec<&str> = deltas.keys().map(|post| &**post).collect();
        let columns: [Vec<i32>; 5] =
            std::array::from_fn(|column| deltas.values().map(|delta| delta[column]).collect());
        let [likes, reposts, replies, quotes, bookmarks] = &columns;
        let sql = include_str!("../../../sql/bulk/count.sql");
        self.ask(sql, &[&posts, likes, reposts, replies, quotes, bookmarks]).await?;
        let copied: Vec<&str> = deltas
            .iter()
            .filter(|(post, delta)| delta[0] != 0 && sorted::has_copied_count(post))
            .map(|(post, _)| &**post)
            .collect();
        if !copied.is_empty() {
            self.ask(include_str!("../../../sql/bulk/copy_counts.sql"), &[&copied]).await?;
        }
        Ok(())
    }

    /// Several statements, sent at once and in this order; of the first that is refused, its error. Without columns, a
    /// statement is not sent, and finds nothing.
    async fn ask_all(&self, asked: Vec<(&str, Option<Columns<'_>>)>) -> Result<Vec<Vec<Row>>, StoreError> {
        let mut prepared = Vec::with_capacity(asked.len());
        for (sql, columns) in &asked {
            prepared.push(match columns {
                // Before any is sent: one that waits for its preparation would be sent too late.
                Some(columns) => Some((self.in_time(self.client.prepare_cached(sql)).await?, columns)),
                None => None,
            });
        }
        let answers = prepared.iter().map(async |prepared| match prepared {
            Some((statement, columns)) => self.in_time(self.client.query(statement, columns)).await,
            None => Ok(Vec::new()),
        });
        join_all(answers).await.into_iter().collect()
    }

    /// One prepared statement.
    async fn ask(&self, sql: &str, parameters: Parameters<'_>) -> Result<Vec<Row>, StoreError> {
        let statement = self.in_time(self.client.prepare_cached(sql)).await?;
        self.in_time(self.client.query(&statement, parameters)).await
    }
}

/// The operations that take the careful way.
#[derive(Default)]
struct Careful<'e> {
    ops: Vec<SqlOp<'e>>,
    kinds: Vec<&'static str>,
}

impl<'e> Careful<'e> {
    fn of(sorted: &Sorted<'e, '_>) -> Self {
        let mut careful = Self::default();
        for (event, op) in sorted.going(Way::Change) {
            careful.ops.push(SqlOp::of(event, op));
            careful.kinds.push(kind_of(op));
        }
        careful
    }
}

/// What the careful way did: whether each operation changed something, and the changes of counters.
#[derive(Default)]
struct Changed {
    applied: Vec<bool>,
    deltas: Vec<(String, [i32; 5])>,
}

/// Adds to the changes of a post's counters.
fn add<'e>(deltas: &mut Deltas<'e>, post: Cow<'e, str>, delta: [i32; 5]) {
    for (sum, change) in deltas.entry(post).or_default().iter_mut().zip(delta) {
        *sum += change;
    }
}

/// The outcome of each event, if it has one.
fn outcomes(
    sorted: &Sorted<'_, '_>,
    done: &HashSet<String>,
    changed: &[bool],
) -> Result<Vec<Option<Outcome>>, StoreError> {
    let mut changed = changed.iter();
    let mut of = |op: &Op<'_>, way: Way| match way {
        Way::Insert | Way::Replaced => Some(true),
        Way::Stale => Some(false),
        Way::Delete | Way::Register | Way::Plain => Some(done.contains(&op.uri)),
        Way::Change => changed.next().copied(),
    };
    sorted
        .events()
        .map(|(event, ways)| {
            let Some(ways) = ways else { return Ok(None) };
            let changed: Option<Vec<bool>> =
                event.ops.iter().zip(ways).map(|(op, way)| of(op, *way)).collect();
            Ok(Some(outcome(event, &changed.ok_or_else(too_few)?)))
        })
        .collect()
}
