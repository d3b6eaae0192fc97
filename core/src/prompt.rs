//! What a model is asked, before any chat template.

use serde::{Deserialize, Serialize};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Turn")]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text of the turn.
    pub content: String,
}

/// A turn as it came from outside.
#[derive(Deserialize)]
struct Turn {
    role: String,
    content: String,
}

impl TryFrom<Turn> for ChatMessage {
    type Error = ChatError;

    fn try_from(turn: Turn) -> Result<Self, ChatError> {
        Self::new(&turn.role, turn.content)
    }
}

/// Why turns are no conversation that a model can be asked to go on with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    /// A role that chat templates would leave out or take for another.
    #[error("a message has the role {role:?}, it must be system, user or assistant")]
    UnknownRole {
        /// The role.
        role: String,
    },
    /// Nothing is asked.
    #[error("the conversation has no message of the user")]
    NoUser,
}

impl ChatMessage {
    /// A turn as it came from outside.
    ///
    /// # Errors
    /// The role is not `system`, `user` or `assistant`.
    pub fn new(role: &str, content: impl Into<String>) -> Result<Self, ChatError> {
        if !matches!(role, "system" | "user" | "assistant") {
            return Err(ChatError::UnknownRole { role: role.to_owned() });
        }
        Ok(Self {
            role: role.to_owned(),
            content: content.into(),
        })
    }

    /// A turn of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self {
            role: "user".to_owned(),
            content: content.into(),
        }
    }

    /// A turn of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self {
            role: "assistant".to_owned(),
            content: content.into(),
        }
    }
}

/// What a model is asked. The model's chat template turns it into text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// A single instruction: one turn of the user.
    Instruction(String),
    /// A conversation whose next turn is the assistant's.
    Chat(Vec<ChatMessage>),
}

impl Prompt {
    /// A conversation as it came from outside.
    ///
    /// # Errors
    /// The user says nothing in it.
    pub fn chat(messages: Vec<ChatMessage>) -> Result<Self, ChatError> {
        match messages.iter().any(|m| m.role == "user") {
            true => Ok(Self::Chat(messages)),
            false => Err(ChatError::NoUser),
        }
    }

    /// The prompt as turns of a conversation.
    pub fn messages(&self) -> Vec<ChatMessage> {
        match self {
            Self::Instruction(text) => vec![ChatMessage::user(text.clone())],
            Self::Chat(messages) => messages.clone(),
        }
    }

    /// The same prompt with `suffix` after the last turn of the user; the length questions are put this way.
    /// A conversation without such a turn gets one.
    pub fn with_suffix(&self, suffix: &str) -> Self {
        match self {
            Self::Instruction(text) => Self::Instruction(format!("{text}{suffix}")),
            Self::Chat(messages) => {
                let mut messages = messages.clone();
                match messages.iter_mut().rev().find(|m| m.role == "user") {
                    Some(last) => last.content.push_str(suffix),
                    None => messages.push(ChatMessage::user(suffix.trim_start())),
                }
                Self::Chat(messages)
            }
        }
    }

    /// Whether there is no text in it at all.
    pub fn is_blank(&self) -> bool {
        match self {
            Self::Instruction(text) => text.trim().is_empty(),
            Self::Chat(messages) => messages.iter().all(|m| m.content.trim().is_empty()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffix_goes_to_the_last_user_turn() {
        let chat = Prompt::Chat(vec![
            ChatMessage::user("a"),
            ChatMessage::assistant("b"),
            ChatMessage::user("c"),
        ]);
        let Prompt::Chat(got) = chat.with_suffix("!") else {
            panic!("a chat stays a chat");
        };
        assert_eq!(got[0].content, "a");
        assert_eq!(got[2].content, "c!");
    }

    #[test]
    fn roles_that_no_template_knows_are_refused() {
        for role in ["system", "user", "assistant"] {
            assert_eq!(ChatMessage::new(role, "a").map(|m| m.role), Ok(role.to_owned()));
        }
        for role in ["robot", "", "User", "tool"] {
            let err = ChatMessage::new(role, "a").expect_err(role).to_string();
            assert!(err.contains(&format!("{role:?}")), "{err}");
        }
    }

    #[test]
    fn a_conversation_needs_the_user() {
        let system = ChatMessage::new("system", "be brief").expect("a known role");
        for messages in [vec![], vec![system.clone()], vec![ChatMessage::assistant("a")]] {
            assert_eq!(Prompt::chat(messages), Err(ChatError::NoUser));
        }
        Prompt::chat(vec![system, ChatMessage::user("a")]).expect("a conversation");
    }

    #[test]
    fn blank_is_white_space_only() {
        assert!(Prompt::Instruction(" \n".into()).is_blank());
        assert!(!Prompt::Instruction("x".into()).is_blank());
    }
}
