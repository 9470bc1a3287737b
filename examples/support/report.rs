//! What a benchmark measured: one table for people, one object for programs.

use serde_json::{Value, json};
use tms_memcache::device::{DeviceInfo, DeviceKind};

use super::human;

/// What an H200 must reach.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// Gigabytes per second, at least.
    Rate(f64),
    /// Seconds, at most.
    Time(f64),
    /// Of the rate of the ceiling, at least.
    OfCeiling(f64),
}

/// Something else that moved the same bytes in the same run.
#[derive(Clone, Debug)]
pub struct Other {
    pub what: String,
    pub seconds: f64,
}

impl Other {
    pub fn new(what: impl Into<String>, seconds: f64) -> Self {
        Other {
            what: what.into(),
            seconds,
        }
    }
}

/// One thing that was measured.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    pub bytes: u64,
    pub pieces: Option<u64>,
    pub seconds: f64,
    /// The time is what counts, not the rate.
    pub timed: bool,
    pub peer: Option<Other>,
    pub ceiling: Option<Other>,
    pub target: Option<Target>,
    /// Whether the bytes were compared afterwards, and were right.
    pub right: Option<bool>,
}

impl Row {
    pub fn new(name: impl Into<String>, bytes: u64, seconds: f64) -> Self {
        Row {
            name: name.into(),
            bytes,
            pieces: None,
            seconds,
            timed: false,
            peer: None,
            ceiling: None,
            target: None,
            right: None,
        }
    }

    fn in_time(&self) -> bool {
        self.timed || matches!(self.target, Some(Target::Time(_)))
    }

    /// Whether the target is reached; `None` without one.
    pub fn met(&self) -> Option<bool> {
        Some(match self.target? {
            Target::Rate(least) => self.bytes as f64 / self.seconds / 1e9 >= least,
            Target::Time(most) => self.seconds <= most,
            Target::OfCeiling(part) => self.ceiling.as_ref()?.seconds / self.seconds >= part,
        })
    }

    fn amount(&self, seconds: f64) -> String {
        if !self.in_time() {
            return human::rate(self.bytes, seconds)
                .map_or("-".into(), |rate| format!("{rate:.1}"));
        }
        match seconds {
            seconds if seconds < 1e-6 => format!("{:.0} ns", seconds * 1e9),
            seconds if seconds < 1e-3 => format!("{:.1} µs", seconds * 1e6),
            seconds => format!("{:.2} ms", seconds * 1e3),
        }
    }

    fn other(&self, other: Option<&Other>) -> String {
        other.map_or("-".into(), |other| {
            format!("{} ({})", self.amount(other.seconds), other.what)
        })
    }

    fn target(&self) -> String {
        match self.target {
            None => "-".into(),
            Some(Target::Rate(least)) => format!(">= {least}"),
            Some(Target::Time(most)) => format!("<= {}", self.amount(most)),
            Some(Target::OfCeiling(part)) => format!(">= {part} of the ceiling"),
        }
    }

    fn as_json(&self, judged: bool) -> Value {
        let rate = |seconds: f64| human::rate(self.bytes, seconds).filter(|_| !self.timed);
        let other = |other: &Option<Other>| {
            other.as_ref().map(|other| {
                json!({
                    "what": other.what,
                    "seconds": other.seconds,
                    "gb_per_second": rate(other.seconds),
                })
            })
        };
        let target = self.target.map(|target| match target {
            Target::Rate(least) => json!({"at_least_gb_per_second": least}),
            Target::Time(most) => json!({"at_most_seconds": most}),
            Target::OfCeiling(part) => json!({"at_least_of_ceiling": part}),
        });
        json!({
            "name": self.name,
            "bytes": self.bytes,
            "pieces": self.pieces,
            "seconds": self.seconds,
            "gb_per_second": rate(self.seconds),
            "peer": other(&self.peer),
            "ceiling": other(&self.ceiling),
            "target": target,
            "met": self.met().filter(|_| judged),
            "bytes_right": self.right,
        })
    }
}

/// All rows, and where they were measured.
pub struct Report {
    device: DeviceInfo,
    pub rows: Vec<Row>,
}

impl Report {
    pub fn new(device: &DeviceInfo) -> Self {
        Report {
            device: device.clone(),
            rows: Vec::new(),
        }
    }

    /// Targets are for a GPU.
    fn judged(&self) -> bool {
        self.device.kind == DeviceKind::Cuda
    }

    /// No row has wrong bytes.
    pub fn right(&self) -> bool {
        self.rows.iter().all(|row| row.right != Some(false))
    }

    /// `extra` are further entries of the object.
    pub fn as_json(&self, extra: Value) -> Value {
        let mut object = json!({
            "device": {
                "kind": self.device.kind.to_string(),
                "ordinal": self.device.ordinal,
                "name": self.device.name,
                "driver_version": self.device.driver_version,
            },
            "rows": self
                .rows
                .iter()
                .map(|row| row.as_json(self.judged()))
                .collect::<Vec<_>>(),
        });
        if let (Value::Object(object), Value::Object(extra)) = (&mut object, extra) {
            object.extend(extra);
        }
        object
    }

    pub fn print(&self) {
        let device = &self.device;
        println!(
            "{} {}: {}. GB/s where no unit is given.",
            device.kind, device.ordinal, device.name
        );
        if !self.judged() {
            println!("The targets are for an H200; this is memory of the machine.");
        }
        println!();
        println!("| what | bytes | pieces | ours | peer | ceiling | target | |");
        println!("|---|---|---|---|---|---|---|---|");
        for row in &self.rows {
            let verdict = match (row.right, row.met().filter(|_| self.judged())) {
                (Some(false), _) => "WRONG BYTES",
                (_, Some(true)) => "reached",
                (_, Some(false)) => "missed",
                _ => "",
            };
            let bytes = match row.bytes {
                0 => "-".into(),
                bytes => human::bytes(bytes),
            };
            println!(
                "| {} | {bytes} | {} | {} | {} | {} | {} | {verdict} |",
                row.name,
                row.pieces.map_or("-".into(), |pieces| pieces.to_string()),
                row.amount(row.seconds),
                row.other(row.peer.as_ref()),
                row.other(row.ceiling.as_ref()),
                row.target(),
            );
        }
        println!();
    }
}
