//! Which method copies pieces of which size, for each direction of a device: as text, and as the
//! choice for a piece. Measuring is the business of `calibrate`.

use std::fmt::Write;

use crate::device::{Device, Direction};
use crate::error::{Error, Result};

/// How pieces are given to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// One call of the driver for each piece.
    Plain,
    /// One call of the driver for many.
    Batch,
    /// A kernel that reads a list of pieces.
    Kernel,
}

impl Method {
    pub const ALL: [Method; 3] = [Method::Plain, Method::Batch, Method::Kernel];

    fn name(self) -> &'static str {
        match self {
            Method::Plain => "plain",
            Method::Batch => "batch",
            Method::Kernel => "kernel",
        }
    }

    /// Whether the device can do it.
    pub fn works_on(self, device: &dyn Device) -> bool {
        match self {
            Method::Plain => true,
            Method::Batch => device.has_batch(),
            Method::Kernel => device.has_kernels(),
        }
    }
}

/// The upper ends of the size classes, bytes; the last one has none.
pub(super) const CLASSES: [u64; 6] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, u64::MAX];

pub(super) const DIRECTIONS: [Direction; 3] =
    [Direction::ToDevice, Direction::ToHost, Direction::OnDevice];

fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::ToDevice => "h2d",
        Direction::ToHost => "d2h",
        Direction::OnDevice => "d2d",
    }
}

fn row(direction: Direction) -> usize {
    match direction {
        Direction::ToDevice => 0,
        Direction::ToHost => 1,
        Direction::OnDevice => 2,
    }
}

/// The class of a piece.
pub(super) fn class_of(bytes: u64) -> usize {
    CLASSES.iter().take_while(|&&end| bytes > end).count()
}

/// One direction and class.
#[derive(Clone, Copy, Debug)]
struct Entry {
    method: Method,
    /// Chosen by somebody, so that measuring leaves it alone.
    fixed: bool,
    /// By [`Method::ALL`], 10⁹ bytes a second; 0 where it was not measured.
    measured: [f64; 3],
}

/// The table of one device.
#[derive(Clone, Debug)]
pub struct Table {
    entries: [[Entry; CLASSES.len()]; DIRECTIONS.len()],
}

impl Default for Table {
    /// What was found best on an H200; on what has no kernels or batches, what is nearest to it.
    fn default() -> Table {
        let entry = |method| Entry {
            method,
            fixed: false,
            measured: [0.0; 3],
        };
        let bus = [
            Method::Kernel,
            Method::Kernel,
            Method::Kernel,
            Method::Kernel,
            Method::Batch,
            Method::Plain,
        ];
        let on_device = [
            Method::Kernel,
            Method::Kernel,
            Method::Kernel,
            Method::Kernel,
            Method::Kernel,
            Method::Plain,
        ];
        Table {
            entries: [bus.map(entry), bus.map(entry), on_device.map(entry)],
        }
    }
}

impl Table {
    /// The methods by class, each one that the device can do.
    pub(super) fn methods(
        &self,
        direction: Direction,
        device: &dyn Device,
    ) -> [Method; CLASSES.len()] {
        self.entries[row(direction)].map(|entry| match entry.method {
            Method::Kernel if device.has_kernels() => Method::Kernel,
            Method::Kernel | Method::Batch if device.has_batch() => Method::Batch,
            _ => Method::Plain,
        })
    }

    /// Whether every entry was chosen by somebody.
    pub(super) fn is_fixed(&self) -> bool {
        self.entries.iter().flatten().all(|entry| entry.fixed)
    }

    /// Takes over what was measured of one class, and the fastest method unless one was chosen.
    /// Another method must be faster than plain copies, which need the least, by more than noise.
    pub(super) fn note(&mut self, direction: Direction, class: usize, measured: [f64; 3]) {
        const CLEARLY: f64 = 1.02;
        let entry = &mut self.entries[row(direction)][class];
        entry.measured = measured;
        if entry.fixed {
            return;
        }
        let mut best = (Method::Plain, measured[0] * CLEARLY);
        for (method, speed) in Method::ALL.into_iter().zip(measured).skip(1) {
            if speed > best.1 {
                best = (method, speed);
            }
        }
        entry.method = best.0;
    }

    /// One line for each class, which [`Self::set`] understands: what is chosen, then what was
    /// measured.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for direction in DIRECTIONS {
            for (entry, end) in self.entries[row(direction)].iter().zip(CLASSES) {
                let _ = write!(text, "{}:", direction_name(direction));
                let _ = match end {
                    u64::MAX => write!(text, "max"),
                    end => write!(text, "{end}"),
                };
                let _ = write!(text, "={}", entry.method.name());
                for (method, speed) in Method::ALL.into_iter().zip(entry.measured) {
                    if speed > 0.0 {
                        let _ = write!(text, " {}:{speed:.3}", method.name());
                    }
                }
                text.push('\n');
            }
        }
        text
    }

    /// Chooses methods by text: entries `direction:class=method`, separated by commas or line ends.
    /// The direction is h2d, d2h or d2d, the class a size in bytes as in [`Self::text`] or `max`,
    /// the method kernel, batch or plain. Words after an entry, and lines that begin with `#`, are
    /// skipped. All of it is taken or nothing.
    pub fn set(&mut self, text: &str) -> Result<()> {
        let mut changed = self.clone();
        for line in text.split([',', '\n']) {
            let Some(entry) = line.split_whitespace().next() else {
                continue;
            };
            if !entry.starts_with('#') {
                changed.set_entry(entry)?;
            }
        }
        *self = changed;
        Ok(())
    }

    fn set_entry(&mut self, text: &str) -> Result<()> {
        let wrong = |why: &str| {
            Error::invalid(
                "text",
                format_args!("\"{text}\" {why}; write for example h2d:4096=kernel"),
            )
        };
        let (place, method) = text.split_once('=').ok_or_else(|| wrong("has no method"))?;
        let (direction, class) = place
            .split_once(':')
            .ok_or_else(|| wrong("has no size class"))?;
        let direction = DIRECTIONS
            .into_iter()
            .find(|known| direction_name(*known) == direction)
            .ok_or_else(|| wrong("has a direction that is none of h2d, d2h, d2d"))?;
        let end = match class {
            "max" => Some(u64::MAX),
            number => number.parse().ok(),
        };
        let class = CLASSES
            .iter()
            .position(|known| Some(*known) == end)
            .ok_or_else(|| {
                wrong("has a class that is none of 4096, 16384, 65536, 262144, 1048576, max")
            })?;
        let method = Method::ALL
            .into_iter()
            .find(|known| known.name() == method)
            .ok_or_else(|| wrong("has a method that is none of kernel, batch, plain"))?;
        let entry = &mut self.entries[row(direction)][class];
        entry.method = method;
        entry.fixed = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn classes_end_where_they_say() {
        assert_eq!(class_of(1), 0);
        for (class, end) in CLASSES.into_iter().enumerate().take(5) {
            assert_eq!(class_of(end), class);
            assert_eq!(class_of(end + 1), class + 1);
        }
        assert_eq!(class_of(u64::MAX), 5);
    }

    #[test]
    fn what_is_printed_can_be_set() {
        let mut table = Table::default();
        table.set("h2d:4096=plain, d2d:max=kernel").unwrap();
        table.note(Direction::ToDevice, 0, [1.0, 2.0, 50.0]);
        table.note(Direction::ToHost, 0, [1.0, 2.0, 50.0]);
        table.note(Direction::ToHost, 5, [50.0, 51.0, 49.0]);
        let text = table.text();
        assert!(text.contains("h2d:4096=plain plain:1.000 batch:2.000 kernel:50.000\n"));
        assert!(text.contains("d2h:4096=kernel plain:1.000"));
        assert!(text.contains("d2h:max=plain plain:50.000"));
        let mut other = Table::default();
        other.set(&format!("# a comment\n{text}")).unwrap();
        assert!(other.is_fixed() && !table.is_fixed());
        let chosen = |table: &Table| -> Vec<Method> {
            let all = table.entries.iter().flatten();
            all.map(|entry| entry.method).collect()
        };
        assert_eq!(chosen(&other), chosen(&table));
    }

    #[test]
    fn a_wrong_text_changes_nothing_and_is_quoted() {
        for text in [
            "h2d",
            "h2d=plain",
            "h2h:max=plain",
            "h2d:5=plain",
            "h2d:max=fast",
        ] {
            let mut table = Table::default();
            let error = table.set(&format!("h2d:max=kernel,{text}")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(
                error.to_string().contains(&format!("\"{text}\"")),
                "{error}"
            );
            assert_eq!(table.text(), Table::default().text());
        }
    }
}
