//! Named points at every durable boundary, at which a test lets the process die.
//!
//! Only in debug builds; a release build contains none of this. `STANDPIPE_CRASH_AT=<point>:<n>` makes the process
//! abort when it reaches that point for the n-th time. It reports this on standard error, so that a test can prove that
//! the process died there. (This is the one place besides the configuration that reads the environment: it is not a
//! setting.)

/// A durable boundary, and what recovery must do after a process died there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Entries and cursor are in Redis; the reader does not know it yet. The next reader starts from the cursor in
    /// Redis, and anything that it appends twice is harmless.
    AfterAppend,
    /// Entries are pending with us and untouched. They are read again under the same name, or claimed by others.
    AfterRead,
    /// A client's events are in the stream; the client does not know it yet, and sends them again.
    AfterIngest,
    /// Events are committed and confirmed, but not flushed. If PostgreSQL survives, they are there and applying them
    /// again changes nothing; if not, they may be lost and are applied again.
    AfterCommit,
    /// Posts or gates are committed, and those that may not have seen each other are not judged again yet. They are
    /// applied again, which changes nothing, and judged then.
    BeforeJudging,
    /// Events are durable but pending. They are applied again, which changes nothing.
    AfterFlush,
    /// The good entries of a batch are acknowledged, the bad ones are not dead letters yet. They are read again, and
    /// then become dead letters, once.
    BeforeDeadLetter,
    /// A bad entry is a dead letter and acknowledged, in one transaction. Nothing is left to do.
    AfterDeadLetter,
    /// Entries of another consumer are now ours and untouched. Recovery is as after a read.
    WhileClaiming,
    /// A repository has been fetched to be repaired, and nothing is done yet. It is fetched again.
    AfterFetch,
    /// Operations older than a fetched repository are dead; what it has and the tables lack is not in the stream yet. It is
    /// fetched and compared again.
    AfterComplete,
    /// The difference is in the stream, and the queue does not know it yet. It is compared again, and what was applied by
    /// then is not appended again.
    AfterRepair,
    /// A function has done a task, and the task is still in its stream. It is begun again, found to be done, and removed.
    AfterTask,
    /// A migration is open. It is rolled back, and run again from its beginning.
    InMigration,
}

/// Every point.
pub const ALL: [Point; 14] = [
    Point::AfterAppend,
    Point::AfterRead,
    Point::AfterIngest,
    Point::AfterCommit,
    Point::BeforeJudging,
    Point::AfterFlush,
    Point::BeforeDeadLetter,
    Point::AfterDeadLetter,
    Point::WhileClaiming,
    Point::AfterFetch,
    Point::AfterComplete,
    Point::AfterRepair,
    Point::AfterTask,
    Point::InMigration,
];

impl Point {
    /// Its name in `STANDPIPE_CRASH_AT`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Point::AfterAppend => "after-append",
            Point::AfterRead => "after-read",
            Point::AfterIngest => "after-ingest",
            Point::AfterCommit => "after-commit",
            Point::BeforeJudging => "before-judging",
            Point::AfterFlush => "after-flush",
            Point::BeforeDeadLetter => "before-dead-letter",
            Point::AfterDeadLetter => "after-dead-letter",
            Point::WhileClaiming => "while-claiming",
            Point::AfterFetch => "after-fetch",
            Point::AfterComplete => "after-complete",
            Point::AfterRepair => "after-repair",
            Point::AfterTask => "after-task",
            Point::InMigration => "in-migration",
        }
    }
}

/// Aborts here if a test asks for it.
#[cfg(debug_assertions)]
pub fn at(point: Point) {
    if is_due(point) {
        now(point);
    }
}

/// Nothing.
#[cfg(not(debug_assertions))]
#[inline]
pub fn at(_: Point) {}

/// Panics if a test asks for it on this text (`STANDPIPE_PANIC_OVER`): no entry is known to make the program panic, and
/// it must survive the unknown ones.
///
/// # Panics
///
/// If a test wants it.
#[cfg(debug_assertions)]
pub fn panic_over(stage: &str, text: &str) {
    use std::sync::LazyLock;
    static WANTED: LazyLock<Option<(String, String)>> = LazyLock::new(|| {
        let wanted = std::env::var("STANDPIPE_PANIC_OVER").ok()?;
        let (stage, text) = wanted.split_once(':')?;
        Some((stage.to_owned(), text.to_owned()))
    });
    if let Some((at, over)) = &*WANTED {
        assert!(at != stage || !text.contains(over.as_str()), "a test wants this: {over}");
    }
}

/// Nothing.
#[cfg(not(debug_assertions))]
#[inline]
pub fn panic_over(_: &str, _: &str) {}

/// Whether a test asks the process to abort here, this time. For a point that needs some preparation.
#[cfg(debug_assertions)]
#[must_use]
pub fn is_due(point: Point) -> bool {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicI64, Ordering};
    static WANTED: LazyLock<Option<(String, AtomicI64)>> = LazyLock::new(|| {
        let wanted = std::env::var("STANDPIPE_CRASH_AT").ok()?;
        let (name, times) = wanted.split_once(':').unwrap_or((&wanted, "1"));
        Some((name.to_owned(), AtomicI64::new(times.parse().unwrap_or(1))))
    });
    match &*WANTED {
        Some((name, left)) if name == point.name() => left.fetch_sub(1, Ordering::Relaxed) == 1,
        _ => false,
    }
}

/// Never.
#[cfg(not(debug_assertions))]
#[inline]
#[must_use]
pub fn is_due(_: Point) -> bool {
    false
}

/// Dies.
#[cfg(debug_assertions)]
pub fn now(point: Point) {
    eprintln!("crash point {} reached", point.name());
    std::process::abort();
}

/// Nothing.
#[cfg(not(debug_assertions))]
#[inline]
pub fn now(_: Point) {}
