"""A ClientApp that answers with what it was sent."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    return Message(content=message.content, reply_to=message)
