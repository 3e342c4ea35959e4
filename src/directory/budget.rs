//! Limits how much is fetched from one domain for repairs. Its owner can create any number of hosts, accounts and large
//! repositories, and trigger a repair of each at any time by breaking its chain of commits.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use super::MAX_HOSTS;
use crate::mutex::lock;

/// Bytes that may be fetched at once.
const AT_ONCE: f64 = 64.0 * 1024.0 * 1024.0;
/// Bytes per second after that.
const PER_SECOND: f64 = AT_ONCE / 10.0;

/// What was fetched from a domain recently: a bucket that leaks at [`PER_SECOND`].
#[derive(Clone, Copy)]
struct Level {
    bytes: f64,
    at: Instant,
}

impl Level {
    fn now(self, now: Instant) -> f64 {
        (self.bytes - now.saturating_duration_since(self.at).as_secs_f64() * PER_SECOND).max(0.0)
    }
}

/// The domains from which something was fetched lately.
#[derive(Default)]
pub(super) struct Budgets(Mutex<HashMap<String, Level>>);

impl Budgets {
    /// How long to wait before anything else is fetched from a host's domain; `None` if it may be now.
    pub(super) fn wait(&self, host: &str, now: Instant) -> Option<Duration> {
        let over = lock(&self.0).get(domain_of(host))?.now(now) - AT_ONCE;
        (over >= 0.0).then(|| Duration::from_secs_f64(over / PER_SECOND + 0.1))
    }

    /// So many bytes came from a host.
    pub(super) fn spend(&self, host: &str, bytes: usize, now: Instant) {
        let domain = domain_of(host);
        let mut levels = lock(&self.0);
        if !levels.contains_key(domain) && levels.len() >= MAX_HOSTS {
            levels.retain(|_, level| level.now(now) > 0.0);
            if levels.len() >= MAX_HOSTS {
                // Ten thousand domains at a time: the number of fetches is what limits them.
                return;
            }
        }
        let level = levels.entry(domain.to_owned()).or_insert(Level { bytes: 0.0, at: now });
        *level = Level { bytes: level.now(now) + bytes as f64, at: now };
    }
}

/// The part of a host's name that somebody has registered, as far as that can be told without a list: the last two labels, or
/// three below a second level such as `co.uk`. An address is its own.
fn domain_of(host: &str) -> &str {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    if name.parse::<IpAddr>().is_ok() || name.starts_with('[') {
        return host;
    }
    let mut dots = name.rmatch_indices('.').map(|(at, _)| at);
    let (Some(last), Some(second)) = (dots.next(), dots.next()) else { return name };
    let is_general = name.len() - last == 3 && last - second <= 4;
    match (is_general, dots.next()) {
        (false, _) => name.split_at(second + 1).1,
        (true, Some(third)) => name.split_at(third + 1).1,
        (true, None) => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_told_by_what_somebody_has_registered() {
        for (host, domain) in [
            ("localhost", "localhost"),
            ("example.com", "example.com"),
            ("pds.example.com:8443", "example.com"),
            ("a.b.c.example.com", "example.com"),
            ("morel.us-east.host.bsky.network", "bsky.network"),
            ("pds.example.de", "example.de"),
            ("example.co.uk", "example.co.uk"),
            ("a.b.example.co.uk", "example.co.uk"),
            ("127.0.0.1:2583", "127.0.0.1:2583"),
            ("[::1]:2583", "[::1]:2583"),
        ] {
            assert_eq!(domain_of(host), domain, "{host}");
        }
    }

    #[test]
    fn a_domain_waits_until_what_it_sent_has_run_down() {
        let budgets = Budgets::default();
        let (one, other, now) = ("a.example.com", "b.example.com", Instant::now());
        budgets.spend(one, 63 << 20, now);
        assert_eq!(budgets.wait(one, now), None);
        budgets.spend(other, 65 << 20, now);
        // Half of 128 MiB is too much, at 6.4 a second.
        let wait = budgets.wait(one, now).unwrap();
        assert!((10.0..10.2).contains(&wait.as_secs_f64()), "{wait:?}");
        assert_eq!(budgets.wait(other, now), Some(wait));
        assert_eq!(budgets.wait("example.org", now), None);
        let later = now + wait;
        assert_eq!(budgets.wait(one, later), None);
        budgets.spend(one, 2 << 20, later);
        assert!(budgets.wait(one, later).is_some());
    }

    #[test]
    fn memory_is_bounded() {
        let (budgets, now) = (Budgets::default(), Instant::now());
        for number in 0..MAX_HOSTS + 100 {
            budgets.spend(&format!("{number}.com"), 1 << 20, now);
        }
        assert_eq!(lock(&budgets.0).len(), MAX_HOSTS);
        budgets.spend("another.com", 1, now + Duration::from_secs(1));
        assert_eq!(lock(&budgets.0).len(), 1);
    }
}
