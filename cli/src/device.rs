//! What `--device` names.

use std::str::FromStr;

use anyhow::Context;
use candle_core::Device;
use lengthwise_model::without_backtrace;

/// A device as asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The processor.
    Cpu,
    /// The GPU with this number.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", number)) => {
                let number = number
                    .parse()
                    .map_err(|_| format!("\"{number}\" is no number of a GPU"))?;
                Ok(Self::Cuda(number))
            }
            _ => Err("there are cpu, cuda and cuda:N".to_owned()),
        }
    }
}

/// Opens the device; where none is asked for, a GPU if this build can use one and one is there.
///
/// # Errors
/// A GPU was asked for that cannot be used.
pub fn open(choice: Option<DeviceChoice>) -> anyhow::Result<Device> {
    let built_in = candle_core::utils::cuda_is_available();
    match choice {
        Some(DeviceChoice::Cpu) => Ok(Device::Cpu),
        Some(DeviceChoice::Cuda(_)) if !built_in => {
            anyhow::bail!("this program was built without CUDA: use --device cpu")
        }
        Some(DeviceChoice::Cuda(number)) => gpu(number).with_context(|| format!("GPU {number} cannot be used")),
        None if built_in => Ok(gpu(0).unwrap_or_else(|err| {
            tracing::debug!("no GPU, so the CPU is used: {err}");
            Device::Cpu
        })),
        None => Ok(Device::Cpu),
    }
}

/// A GPU with one stream for all threads: candle's own choice is one per thread, and a model is loaded by one thread and
/// run by another.
fn gpu(number: usize) -> anyhow::Result<Device> {
    let device = Device::new_cuda_with_stream(number).map_err(without_backtrace)?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = &device {
        // SAFETY: there is one stream, so nothing has to be ordered between two.
        unsafe { cuda.disable_event_tracking() };
    }
    Ok(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        assert_eq!("cpu".parse(), Ok(DeviceChoice::Cpu));
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cpu:0"] {
            assert!(wrong.parse::<DeviceChoice>().is_err(), "{wrong}");
        }
    }
}
