"""Each call is written once, with `await`; this makes it a blocking method of one client and a coroutine of the other.

    class Jobs(Resource[W]):
        @call
        async def get(self, job_id: str) -> Job: ...

    Graft().jobs.get("job_1")             # a Job: Jobs[BlockingWire]
    await AsyncGraft().jobs.get("job_1")  # a Job: Jobs[AsyncWire]

The blocking one works because a `BlockingWire` never suspends: the coroutine ends within its first step.
"""

import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from types import MethodType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

from graft_client.connection import Connection
from graft_client.wire import AsyncWire, BlockingWire, W

P = ParamSpec("P")
T = TypeVar("T")


class Resource(Generic[W]):
    """A group of calls over one connection."""

    def __init__(self, connection: Connection[W]) -> None:
        self._connection: Connection[W] = connection


class call(Generic[P, T]):
    """A method that answers once."""

    def __init__(self, function: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, resource: None, owner: type) -> Self: ...
    @overload
    def __get__(self, resource: Resource[BlockingWire], owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, resource: Resource[AsyncWire], owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, resource: Any, owner: type) -> Any:
        if resource is None:
            return self
        method = MethodType(self.function, resource)
        return _blocking(method, finished) if _is_blocking(resource) else method


class stream(Generic[P, T]):
    """A method that answers one thing after the other: for `for` with one client, for `async for` with the other."""

    def __init__(self, function: Callable[Concatenate[Any, P], AsyncIterator[T]]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, resource: None, owner: type) -> Self: ...
    @overload
    def __get__(self, resource: Resource[BlockingWire], owner: type) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, resource: Resource[AsyncWire], owner: type) -> Callable[P, AsyncIterator[T]]: ...
    def __get__(self, resource: Any, owner: type) -> Any:
        if resource is None:
            return self
        method = MethodType(self.function, resource)
        return _blocking(method, _iterated) if _is_blocking(resource) else method


def finished(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine that never suspends returns."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise AssertionError("a blocking call has suspended")


def _iterated(items: AsyncGenerator[T, None]) -> Iterator[T]:
    try:
        while True:
            try:
                yield finished(items.__anext__())
            except StopAsyncIteration:
                return
    finally:
        finished(items.aclose())


def _is_blocking(resource: Resource[Any]) -> bool:
    return isinstance(resource._connection.wire, BlockingWire)


def _blocking(method: Callable[..., Any], run: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def blocking(*arguments: Any, **named: Any) -> Any:
        return run(method(*arguments, **named))

    return blocking
