//! What the examples share: model files, a made-up model, and text for people.

pub mod human;
pub mod model;
pub mod random;
pub mod safetensors;
