//! The machine behind the figures, and the kernel's accounting of a process.

use std::fs;

use serde::Serialize;

/// Kernel ticks in a second, as user space sees them; fixed on all of Linux's common platforms.
const TICKS_PER_SECOND: f64 = 100.0;

/// The machine.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Processors that this process may use.
    pub cores: usize,
    /// The name that the kernel has for them.
    pub cpu: String,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// The kernel's release.
    pub kernel: String,
}

impl Machine {
    /// This one.
    #[must_use]
    pub fn this() -> Self {
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        // ARM has no such line.
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown");
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            cpu: cpu.trim_start_matches([' ', '\t', ':']).trim().to_owned(),
            memory_bytes: kibibytes("/proc/meminfo", "MemTotal:").unwrap_or(0),
            kernel: kernel.trim().to_owned(),
        }
    }
}

/// Processor time that a process has used, in seconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu {
    /// Itself, in user space and in the kernel.
    pub own: f64,
    /// Its children that have ended and that it has waited for.
    pub ended_children: f64,
}

/// `None` when the process is gone.
#[must_use]
pub fn cpu(pid: u32) -> Option<Cpu> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // "pid (name) state ...", where the name may hold anything; the four times are the 12th to 15th field after it.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut ticks = fields.split_whitespace().skip(11).map(|field| field.parse::<u64>().unwrap_or(0));
    let mut two = || (ticks.next().unwrap_or(0) + ticks.next().unwrap_or(0)) as f64 / TICKS_PER_SECOND;
    Some(Cpu { own: two(), ended_children: two() })
}

/// Processor seconds that the whole machine has used since its start, what its host withheld included.
#[must_use]
pub fn busy() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let first = stat.lines().next().unwrap_or_default();
    // cpu user nice system idle iowait irq softirq steal ...
    let ticks: u64 = first
        .split_whitespace()
        .skip(1)
        .take(8)
        .enumerate()
        .filter(|(place, _)| !matches!(place, 3 | 4))
        .filter_map(|(_, field)| field.parse::<u64>().ok())
        .sum();
    ticks as f64 / TICKS_PER_SECOND
}

/// The most memory that a process ever had resident, in bytes; `None` when it is gone.
#[must_use]
pub fn peak_memory(pid: u32) -> Option<u64> {
    kibibytes(&format!("/proc/{pid}/status"), "VmHWM:")
}

fn kibibytes(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
}
