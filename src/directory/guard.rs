//! Which addresses may be asked: none inside our own network. A name is checked after it was resolved, at the moment of
//! connecting, so neither a name, nor a redirect, nor a change of the name's address leads inside.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper_util::client::legacy::connect::dns::Name;
use tower_service::Service;

/// What may be asked besides public addresses.
#[derive(Clone, Debug)]
pub(super) struct Guard {
    /// The hosts that the operator named.
    pub(super) trusted: Arc<[String]>,
    /// Everything.
    pub(super) private: bool,
}

impl Guard {
    /// Whether `host` may be asked, if it is an address. Names are checked when they are resolved.
    pub(super) fn allows_host(&self, host: &str) -> bool {
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        self.trusts(host) || address.map_or(true, |address| !is_internal(address))
    }

    fn trusts(&self, host: &str) -> bool {
        self.private || self.trusted.iter().any(|trusted| trusted.eq_ignore_ascii_case(host))
    }
}

impl Service<Name> for Guard {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let guard = self.clone();
        Box::pin(async move {
            let trusted = guard.trusts(name.as_str());
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed: Vec<SocketAddr> =
                found.filter(|address| trusted || !is_internal(address.ip())).collect();
            if allowed.is_empty() {
                let message = format!("{} has no public address", name.as_str());
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
            }
            Ok(allowed.into_iter())
        })
    }
}

/// Whether an address is not a public one (IANA's special-purpose address registries, RFC 6890).
fn is_internal(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_internal_v4(address),
        IpAddr::V6(address) => is_internal_v6(address),
    }
}

fn is_internal_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_documentation()
        || a == 0
        || a >= 240
        // Shared by carriers, protocol assignments, benchmarks.
        || (a == 100 && (64..128).contains(&b))
        || (a == 192 && b == 0 && c == 0)
        || (a == 198 && (b == 18 || b == 19))
}

fn is_internal_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    // The IPv4 address in the 32 bits from this segment on.
    let embedded = |at: usize| {
        let half = |at: usize| u32::from(segments.get(at).copied().unwrap_or_default());
        is_internal_v4(Ipv4Addr::from(half(at) << 16 | half(at + 1)))
    };
    match segments {
        // IPv4 in its two ways of writing (among it loopback and unspecified), behind NAT64, and behind 6to4.
        [0, 0, 0, 0, 0, 0 | 0xffff, ..] | [0x64, 0xff9b, 0, 0, 0, 0, ..] => embedded(6),
        [0x2002, ..] => embedded(1),
        // Teredo, ORCHID, documentation.
        [0x2001, 0 | 0x10..=0x2f | 0xdb8, ..] => true,
        // Everything public is in 2000::/3.
        [first, ..] => first & 0xe000 != 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn internal_addresses_are_known_in_every_way_of_writing_them() {
        for text in [
            "127.0.0.1",
            "127.9.9.9",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "192.0.2.1",
            "198.18.0.1",
            "::",
            "::1",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::a00:1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
            "::ffff:0:7f00:1",
            "100::1",
        ] {
            assert!(is_internal(text.parse().unwrap()), "{text}");
        }
        for text in [
            "1.1.1.1",
            "172.15.0.1",
            "172.32.0.1",
            "100.63.0.1",
            "100.128.0.1",
            "192.0.1.1",
            "198.20.0.1",
            "2606:4700:4700::1111",
            "::ffff:1.1.1.1",
            "64:ff9b::101:101",
            "2002:101:101::",
            "2a00::1",
        ] {
            assert!(!is_internal(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn an_address_instead_of_a_name_is_checked_too() {
        let guard = Guard { trusted: ["plc.internal".to_owned()].into(), private: false };
        for (host, allowed) in [
            ("127.0.0.1", false),
            ("[::1]", false),
            ("1.1.1.1", true),
            ("[2606:4700::1111]", true),
            ("example.com", true),
            ("plc.internal", true),
        ] {
            assert_eq!(guard.allows_host(host), allowed, "{host}");
        }
        assert!(Guard { private: true, ..guard }.allows_host("127.0.0.1"));
    }
}
