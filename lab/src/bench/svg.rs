//! Plots as plain SVG, readable on light and on dark pages.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::report::{Report, Stat};

const WIDTH: f64 = 720.0;
/// Space on the left for what stands beside the axis.
const LEFT: f64 = 210.0;
const RIGHT: f64 = 120.0;
const TOP: f64 = 48.0;
const BAR: f64 = 22.0;
const STEP: f64 = 34.0;
const PLOT_HEIGHT: f64 = 260.0;

const STYLE: &str = "<style>
text{font:13px system-ui,sans-serif;fill:#1f2328}.title{font-size:16px;font-weight:600}.faint{fill:#656d76}
.bar,.dot0{fill:#2f6fde}.dot1{fill:#c4601d}.line0{stroke:#2f6fde}.line1{stroke:#c4601d}
.line0,.line1{fill:none;stroke-width:2}.axis,.range{stroke:#656d76;stroke-width:1}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.faint{fill:#9198a1}.bar,.dot0{fill:#6ea8ff}.dot1{fill:#f0924e}
.line0{stroke:#6ea8ff}.line1{stroke:#f0924e}.axis,.range{stroke:#9198a1}}
</style>
";

/// Writes every plot that the report has figures for; returns the files.
///
/// # Errors
///
/// The folder cannot be written to.
pub fn write(report: &Report, folder: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let mut plots = Vec::new();
    for throughput in &report.throughput {
        let bars = throughput.bars(|variant| variant.events_per_second);
        let (file, subject) = throughput.names();
        let title = format!("Events per second, {subject}");
        plots.push((format!("throughput-{file}"), bar_plot(&title, "", &bars)));
        let cpu = throughput.bars(|variant| variant.postgres_cpu);
        let title = format!("CPU seconds of PostgreSQL per 100,000 events, {subject}");
        plots.push((format!("postgres-cpu-{file}"), bar_plot(&title, "s", &cpu)));
    }
    if !report.latency.is_empty() {
        let bars: Vec<_> = report
            .latency
            .iter()
            .flat_map(|latency| {
                [
                    ("p50", latency.commit_ms.p50),
                    ("p99", latency.commit_ms.p99),
                    ("p99.9", latency.commit_ms.p99_9),
                ]
                .map(|(what, stat)| (format!("{}, {what}", latency.mode), stat))
            })
            .collect();
        let rate = report.latency.first().map_or(0.0, |latency| latency.rate.median);
        let title = format!("From XADD to commit at {rate:.0} events per second");
        plots.push(("latency".to_owned(), bar_plot(&title, "ms", &bars)));
    }
    let mut factors: Vec<&str> = report.sweeps.iter().map(|sweep| sweep.factor).collect();
    factors.dedup();
    for factor in factors {
        let series: Vec<_> = report
            .sweeps
            .iter()
            .filter(|sweep| sweep.factor == factor)
            .map(|sweep| {
                let points = sweep.points.iter().map(|point| (point.value, point.events_per_second));
                (sweep.mode, points.collect::<Vec<_>>())
            })
            .collect();
        let name = factor.replace('_', " ");
        plots.push((
            format!("sweep-{}", factor.replace('_', "-")),
            line_plot(&format!("Events per second by {name}"), &series),
        ));
    }
    let mut files = Vec::new();
    for (name, plot) in plots {
        let path = folder.join(format!("{name}.svg"));
        fs::write(&path, plot).with_context(|| format!("writing {}", path.display()))?;
        files.push(path);
    }
    Ok(files)
}

/// One bar for each figure, with its range.
fn bar_plot(title: &str, unit: &str, bars: &[(String, Stat)]) -> String {
    let most = bars.iter().map(|(_, stat)| stat.max).fold(f64::MIN_POSITIVE, f64::max);
    let x = |value: f64| LEFT + value / most * (WIDTH - LEFT - RIGHT);
    let mut body = String::new();
    for (index, (name, stat)) in bars.iter().enumerate() {
        let y = TOP + index as f64 * STEP;
        let (middle, base) = (y + BAR / 2.0, y + BAR / 2.0 + 4.5);
        text(&mut body, LEFT - 10.0, base, "end", "", name);
        let width = x(stat.median) - LEFT;
        let _ = writeln!(
            body,
            "<rect class=\"bar\" x=\"{LEFT}\" y=\"{y}\" width=\"{width:.1}\" height=\"{BAR}\"/>"
        );
        line(&mut body, "range", x(stat.min), middle, x(stat.max), middle);
        let value = format!("{} {unit}", number(stat.median));
        text(&mut body, x(stat.max) + 8.0, base, "start", "faint", value.trim_end());
    }
    let height = TOP + bars.len() as f64 * STEP;
    line(&mut body, "axis", LEFT, TOP - 6.0, LEFT, height - STEP + BAR + 6.0);
    page(title, height, &body)
}

/// One line for each series. The values on the x axis stand at even distances.
fn line_plot(title: &str, series: &[(&str, Vec<(u64, Stat)>)]) -> String {
    const SIDE: f64 = 70.0;
    let all = || series.iter().flat_map(|(_, points)| points);
    let most = all().map(|(_, stat)| stat.max).fold(f64::MIN_POSITIVE, f64::max) * 1.05;
    let mut values: Vec<u64> = all().map(|(value, _)| *value).collect();
    values.sort_unstable();
    values.dedup();
    let gap = (WIDTH - SIDE - RIGHT) / values.len().saturating_sub(1).max(1) as f64;
    let x = |value: u64| SIDE + values.iter().position(|other| *other == value).unwrap_or(0) as f64 * gap;
    let y = |rate: f64| TOP + PLOT_HEIGHT - rate / most * PLOT_HEIGHT;
    let bottom = TOP + PLOT_HEIGHT;
    let mut body = String::new();
    line(&mut body, "axis", SIDE, TOP, SIDE, bottom);
    line(&mut body, "axis", SIDE, bottom, WIDTH - RIGHT, bottom);
    for part in 0..=4 {
        let rate = most / 4.0 * f64::from(part);
        text(&mut body, SIDE - 8.0, y(rate) + 4.5, "end", "faint", &number(rate));
    }
    for value in &values {
        text(&mut body, x(*value), bottom + 20.0, "middle", "faint", &number(*value as f64));
    }
    for (index, (name, points)) in series.iter().enumerate() {
        // Two modes, two colours.
        let colour = index % 2;
        let path: Vec<String> =
            points.iter().map(|(value, stat)| format!("{:.1},{:.1}", x(*value), y(stat.median))).collect();
        let _ = writeln!(body, "<polyline class=\"line{colour}\" points=\"{}\"/>", path.join(" "));
        for (value, stat) in points {
            line(&mut body, "range", x(*value), y(stat.min), x(*value), y(stat.max));
            let (x, y) = (x(*value), y(stat.median));
            let _ = writeln!(body, "<circle class=\"dot{colour}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"/>");
        }
        // Beside the plot: at the ends of the lines, names that lie together could not be read.
        let (x, y) = (WIDTH - RIGHT + 20.0, TOP + 10.0 + index as f64 * 22.0);
        let _ = writeln!(body, "<circle class=\"dot{colour}\" cx=\"{x}\" cy=\"{y}\" r=\"5\"/>");
        text(&mut body, x + 12.0, y + 4.5, "start", "", name);
    }
    page(title, bottom + 34.0, &body)
}

fn page(title: &str, height: f64, body: &str) -> String {
    let title = escaped(title);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         aria-label=\"{title}\">\n{STYLE}<text class=\"title\" x=\"10\" y=\"24\">{title}</text>\n{body}</svg>\n"
    )
}

fn text(body: &mut String, x: f64, y: f64, anchor: &str, class: &str, words: &str) {
    let words = escaped(words);
    let _ = writeln!(
        body,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>"
    );
}

fn line(body: &mut String, class: &str, x1: f64, y1: f64, x2: f64, y2: f64) {
    let _ = writeln!(
        body,
        "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
    );
}

/// With commas between thousands; places after the point only where they matter.
fn number(value: f64) -> String {
    if value < 100.0 && value.fract() != 0.0 {
        return format!("{value:.2}");
    }
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_formatted_compactly() {
        let shown = [0.0, 0.25, 99.5, 100.4, 1000.0, 1_234_567.0].map(number);
        assert_eq!(shown, ["0", "0.25", "99.50", "100", "1,000", "1,234,567"]);
    }

    #[test]
    fn a_plot_names_every_series_and_closes_every_tag() {
        let stat = Stat { median: 10.0, min: 8.0, max: 12.0 };
        let plot = bar_plot("a < b", "ms", &[("one".to_owned(), stat), ("two".to_owned(), Stat::default())]);
        assert!(plot.contains("a &lt; b") && plot.contains(">one<") && plot.contains(">10 ms<"), "{plot}");
        assert_eq!(plot.matches("<text").count(), plot.matches("</text>").count());
        assert!(plot.ends_with("</svg>\n") && !plot.contains("NaN"));
        let plot =
            line_plot("by size", &[("event", vec![(1, stat), (5_000_000, stat)]), ("batch", Vec::new())]);
        assert!(plot.contains(">5,000,000<") && plot.contains(">event<") && !plot.contains("NaN"), "{plot}");
    }
}
