//! Where records come from and go to in Kafka: `kafka://user:password@host:9092,host:9092/topic?group=g`.

use std::collections::BTreeMap;
use std::fmt;

use percent_encoding::percent_decode_str;

use super::read::Wrong;
use super::url::CaFile;

const PORT: u16 = 9092;
/// The longest name of a topic.
const MAX_TOPIC: usize = 249;
/// The longest name of a group that we accept.
const MAX_GROUP: usize = 255;

/// How to log in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sasl {
    /// The password as it is; only with TLS.
    Plain,
    /// SCRAM-SHA-256.
    Scram256,
    /// SCRAM-SHA-512.
    Scram512,
}

/// A cluster, and who we are there. `Display` and `Debug` hide the password.
#[derive(Clone, PartialEq, Eq)]
pub struct KafkaCluster {
    servers: String,
    login: Option<(Sasl, String, String)>,
    tls: bool,
    ca: Option<CaFile>,
}

impl fmt::Debug for KafkaCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for KafkaCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "kafkas" } else { "kafka" };
        let login = self.login.as_ref().map(|(_, user, _)| format!("{user}:***@")).unwrap_or_default();
        write!(f, "{scheme}://{login}{}", self.servers)
    }
}

impl KafkaCluster {
    /// The brokers to ask first: `host:port`, separated by commas.
    #[must_use]
    pub fn servers(&self) -> &str {
        &self.servers
    }

    /// How to log in, as whom, and the password; never log it.
    #[must_use]
    pub fn login(&self) -> Option<(Sasl, &str, &str)> {
        self.login.as_ref().map(|(sasl, user, password)| (*sasl, user.as_str(), password.as_str()))
    }

    /// Whether connections are encrypted.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// The authorities to trust; `None` for those of the machine.
    #[must_use]
    pub fn ca(&self) -> Option<&CaFile> {
        self.ca.as_ref()
    }

    /// The cluster, its topic, and the parameters that are not the cluster's.
    fn parse(text: &str, right: &str) -> Result<(Self, String, BTreeMap<String, String>), Wrong> {
        let (tls, rest) = match text.split_once("://") {
            Some(("kafka", rest)) => (false, rest),
            Some(("kafkas", rest)) => (true, rest),
            _ => return Err(Wrong::new("is neither kafka:// nor kafkas://", right)),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, topic) = rest.split_once('/').unwrap_or((rest, ""));
        let topic = topic.trim_end_matches('/');
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if topic.is_empty() || topic.len() > MAX_TOPIC || !topic.chars().all(is_name) {
            return Err(Wrong::new("has no usable topic in its path", right));
        }
        let (user, hosts) = match authority.rsplit_once('@') {
            Some((user, hosts)) => (Some(user), hosts),
            None => (None, authority),
        };
        let mut parameters = parameters(query, right)?;
        let login = login(user, parameters.remove("sasl").as_deref(), tls)?;
        let ca = match parameters.remove("cacertfile") {
            Some(path) => CaFile::parse(&path)?,
            None => None,
        };
        if ca.is_some() && !tls {
            return Err(Wrong::new("has cacertfile, but kafka:// does not use TLS", "write kafkas://"));
        }
        Ok((Self { servers: servers(hosts, right)?, login, tls, ca }, topic.to_owned(), parameters))
    }
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn parameters(query: &str, right: &str) -> Result<BTreeMap<String, String>, Wrong> {
    let mut parameters = BTreeMap::new();
    for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
        if parameters.insert(name.clone().into_owned(), value.into_owned()).is_some() {
            return Err(Wrong::new(format!("has {name:.30} twice"), right));
        }
    }
    Ok(parameters)
}

fn login(user: Option<&str>, sasl: Option<&str>, tls: bool) -> Result<Option<(Sasl, String, String)>, Wrong> {
    const RIGHT: &str = "write user:password@ in front of the hosts, percent-encoded, and sasl=scram-sha-512, scram-sha-256 or plain";
    let Some(user) = user else {
        return match sasl {
            Some(_) => Err(Wrong::new("has sasl, but no user", RIGHT)),
            None => Ok(None),
        };
    };
    let Some((user, password)) = user.split_once(':') else {
        return Err(Wrong::new("has a user without a password", RIGHT));
    };
    let sasl = match sasl {
        None | Some("scram-sha-512") => Sasl::Scram512,
        Some("scram-sha-256") => Sasl::Scram256,
        Some("plain") if tls => Sasl::Plain,
        Some("plain") => {
            return Err(Wrong::new("has sasl=plain, which sends the password as it is", "write kafkas://"));
        }
        Some(_) => return Err(Wrong::new("has an unknown sasl", RIGHT)),
    };
    Ok(Some((sasl, decoded(user), decoded(password))))
}

/// Each with a port.
fn servers(hosts: &str, right: &str) -> Result<String, Wrong> {
    let mut servers = Vec::new();
    for host in hosts.split(',') {
        let (name, port) = match host.rsplit_once(':') {
            Some((name, port)) if !name.is_empty() && !port.contains(']') => {
                let port = port.parse::<u16>().ok().filter(|port| *port > 0);
                (name, port.ok_or_else(|| Wrong::new("has a host with a wrong port", right))?)
            }
            _ => (host, PORT),
        };
        if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c == '@') {
            return Err(Wrong::new("names no host", right));
        }
        servers.push(format!("{name}:{port}"));
    }
    Ok(servers.join(","))
}

fn nothing_else(left: &BTreeMap<String, String>, right: &str) -> Result<(), Wrong> {
    match left.keys().next() {
        Some(unknown) => Err(Wrong::new(format!("has the unknown parameter {unknown:.30}"), right)),
        None => Ok(()),
    }
}

/// A topic to take events from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KafkaOrigin {
    /// The cluster.
    pub cluster: KafkaCluster,
    /// The topic.
    pub topic: String,
    /// The group whose offsets are set for those who watch its lag.
    pub group: Option<String>,
}

impl KafkaOrigin {
    pub(super) fn parse(text: &str) -> Result<Self, Wrong> {
        const RIGHT: &str = "write kafka://host:9092,host:9092/topic, or kafkas:// for TLS; also ?group=NAME, sasl and cacertfile";
        let (cluster, topic, mut given) = KafkaCluster::parse(text, RIGHT)?;
        let group = given.remove("group");
        if group.as_ref().is_some_and(|group| group.is_empty() || group.len() > MAX_GROUP) {
            return Err(Wrong::new(format!("has a group that is not 1 to {MAX_GROUP} bytes long"), RIGHT));
        }
        nothing_else(&given, RIGHT)?;
        Ok(Self { cluster, topic, group })
    }
}

impl fmt::Display for KafkaOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let group = self.group.as_ref().map(|group| format!("?group={group}")).unwrap_or_default();
        write!(f, "{}/{}{group}", self.cluster, self.topic)
    }
}

/// A topic to publish to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KafkaOutput {
    /// The cluster.
    pub cluster: KafkaCluster,
    /// The topic.
    pub topic: String,
}

impl KafkaOutput {
    pub(super) fn parse(text: &str) -> Result<Self, Wrong> {
        const RIGHT: &str =
            "write kafka://host:9092,host:9092/topic, or kafkas:// for TLS; also ?sasl and cacertfile";
        let (cluster, topic, given) = KafkaCluster::parse(text, RIGHT)?;
        nothing_else(&given, RIGHT)?;
        Ok(Self { cluster, topic })
    }
}

impl fmt::Display for KafkaOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.cluster, self.topic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_has_hosts_a_topic_and_perhaps_a_login() {
        let origin = KafkaOrigin::parse("kafka://a,b:9093,[::1]:9094/events?group=g").ok().unwrap();
        assert_eq!(origin.cluster.servers(), "a:9092,b:9093,[::1]:9094");
        assert_eq!((origin.topic.as_str(), origin.group.as_deref()), ("events", Some("g")));
        assert_eq!(origin.cluster.login(), None);
        let output = KafkaOutput::parse("kafkas://me:p%40ss@a/t?sasl=plain").ok().unwrap();
        assert_eq!(output.cluster.login(), Some((Sasl::Plain, "me", "p@ss")));
        assert_eq!(output.to_string(), "kafkas://me:***@a:9092/t");
        assert!(!format!("{output:?}").contains("p@ss"));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for (text, says) in [
            ("http://a/t", "neither kafka://"),
            ("kafka://a", "no usable topic"),
            ("kafka://a/t/u", "no usable topic"),
            ("kafka:///t", "names no host"),
            ("kafka://a:0/t", "wrong port"),
            ("kafka://a,/t", "names no host"),
            ("kafka://u@a/t", "without a password"),
            ("kafka://u:p@a/t?sasl=plain", "as it is"),
            ("kafka://u:p@a/t?sasl=x", "unknown sasl"),
            ("kafka://a/t?sasl=plain", "no user"),
            ("kafka://a/t?cacertfile=/nowhere/x.pem", "cannot be read"),
            ("kafka://a/t?group=", "1 to 255"),
            ("kafka://a/t?group=a&group=b", "twice"),
            ("kafka://a/t?prefetch=5", "unknown parameter prefetch"),
        ] {
            let Err(wrong) = KafkaOrigin::parse(text) else { panic!("{text} is taken") };
            assert!(wrong.what.contains(says), "{text}: {}", wrong.what);
        }
    }
}
