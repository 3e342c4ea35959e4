//! Named points at every durable boundary, at which a test lets the process die.
//!
//! Only in debug builds; in a release build nothing of this is left. `STANDPIPE_CRASH_AT=<point>:<n>` lets the process abort
//! when it comes to that point for the n-th time, saying so on standard error, so that a test can prove that it died
//! there. (The one place besides the configuration that reads the environment: it is not a setting.)

/// A durable boundary, and what recovery owes to a process that died there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Entries and cursor are in Redis; the reader does not know it yet. The next reader starts from the cursor in Redis
    /// and appends nothing twice that matters.
    AfterAppend,
    /// Entries are pending with us and nothing has been done about them. They are read again under the same name, or
    /// claimed by others.
    AfterRead,
    /// An event's transaction is open. It is rolled back, and the event applied again.
    InTransaction,
    /// Events are committed and their answers read, but not flushed. If PostgreSQL lives they are there and applying
    /// them again changes nothing; if it does not, they may be gone and are applied again.
    AfterCommit,
    /// Events are durable but pending. They are applied again, which changes nothing.
    AfterFlush,
    /// The good entries of a batch are acknowledged, the bad ones not yet dead letters. They are read again, and
    /// become dead letters then, once.
    BeforeDeadLetter,
    /// A bad entry is a dead letter and acknowledged, in one transaction. Nothing is owed.
    AfterDeadLetter,
    /// Entries of another consumer are ours now and nothing has been done about them. As after a read.
    WhileClaiming,
    /// A migration is open. It is rolled back, and run again from its beginning.
    InMigration,
}

/// Every point.
pub const ALL: [Point; 9] = [
    Point::AfterAppend,
    Point::AfterRead,
    Point::InTransaction,
    Point::AfterCommit,
    Point::AfterFlush,
    Point::BeforeDeadLetter,
    Point::AfterDeadLetter,
    Point::WhileClaiming,
    Point::InMigration,
];

impl Point {
    /// Its name in `STANDPIPE_CRASH_AT`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Point::AfterAppend => "after-append",
            Point::AfterRead => "after-read",
            Point::InTransaction => "in-transaction",
            Point::AfterCommit => "after-commit",
            Point::AfterFlush => "after-flush",
            Point::BeforeDeadLetter => "before-dead-letter",
            Point::AfterDeadLetter => "after-dead-letter",
            Point::WhileClaiming => "while-claiming",
            Point::InMigration => "in-migration",
        }
    }
}

/// Dies here if a test wants it.
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

/// Panics if a test wants it over this text (`STANDPIPE_PANIC_OVER`): the program has no known way to panic over an entry,
/// and must survive the unknown ones.
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

/// Whether a test wants the process to die here, this time. For a point that takes some preparation.
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
