import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from orchestrator.budget import UNLIMITED, ZERO, Account, Amounts, Ask, Ledger, Request, Standing
from orchestrator.errors import BudgetExceededError, InvariantError


def tokens(amount: int) -> Amounts:
    return Amounts(tokens=amount)


def ask(amount: int, **more: object) -> Ask:
    return Ask(fixed=tokens(amount), **more)  # type: ignore[arg-type]


def tree(*limits: int) -> tuple[Ledger, list[Account]]:
    """Accounts one below the other, outermost first, limited in tokens."""
    ledger = Ledger()
    accounts: list[Account] = []
    for depth, limit in enumerate(limits):
        parent = accounts[-1] if accounts else None
        amounts = Amounts(limit, UNLIMITED, UNLIMITED, UNLIMITED)
        accounts.append(ledger.open_account(f"account {depth}", amounts, parent))
    return ledger, accounts


def refusal(request: Request) -> BudgetExceededError:
    assert request.standing is Standing.REFUSED
    assert request.refusal is not None
    return request.refusal


# --- Rules 1 and 2: on the whole path, never past a limit ------------------------------------------------


def test_a_hold_is_taken_on_the_account_and_all_its_ancestors() -> None:
    ledger, (root, middle, leaf) = tree(100, 100, 100)
    request = ledger.request(leaf, ask(30))
    assert request.standing is Standing.GRANTED
    assert [account.held().tokens for account in (root, middle, leaf)] == [30, 30, 30]


def test_a_hold_that_one_account_lacks_room_for_is_taken_on_none() -> None:
    ledger, (root, middle, leaf) = tree(100, 20, 100)
    assert ledger.request(leaf, ask(30)).standing is Standing.REFUSED
    assert [account.held() for account in (root, middle, leaf)] == [ZERO, ZERO, ZERO]


def test_a_sibling_does_not_pay() -> None:
    ledger, (root, left) = tree(100, 100)
    right = ledger.open_account("right", tokens(100), root)
    ledger.request(left, ask(30))
    assert right.held() == ZERO


def test_two_open_holds_cannot_jointly_overshoot() -> None:
    ledger, (root,) = tree(100)
    first, second = ledger.request(root, ask(60)), ledger.request(root, ask(60))
    assert first.standing is Standing.GRANTED
    assert second.standing is Standing.WAITING
    assert root.held() == tokens(60)


def test_two_open_holds_of_siblings_cannot_overshoot_their_parent() -> None:
    ledger, (root, left) = tree(100, 80)
    right = ledger.open_account("right", tokens(80), root)
    assert ledger.request(left, ask(60)).standing is Standing.GRANTED
    assert ledger.request(right, ask(60)).standing is Standing.WAITING


def test_of_64_calls_each_worth_half_the_budget_two_are_admitted() -> None:
    ledger, (root,) = tree(100)
    requests = [ledger.request(root, ask(50)) for _ in range(64)]
    assert [request.standing for request in requests].count(Standing.GRANTED) == 2


def test_a_hold_of_exactly_what_is_left_is_granted() -> None:
    ledger, (root,) = tree(100)
    assert ledger.request(root, ask(100)).standing is Standing.GRANTED


@pytest.mark.parametrize("unit", range(4))
def test_every_unit_is_a_limit_of_its_own(unit: int) -> None:
    limit, wanted = [10, 10, 10, 10], [1, 1, 1, 1]
    wanted[unit] = 11
    ledger = Ledger()
    account = ledger.open_account("run", Amounts(*limit))
    error = refusal(ledger.request(account, Ask(fixed=Amounts(*wanted))))
    assert Amounts._fields[unit] in str(error)


# --- Rule 2: confirmed, unconfirmed, and what comes back -------------------------------------------------


def test_settling_gives_back_what_was_not_billed() -> None:
    ledger, (root, leaf) = tree(100, 100)
    request = ledger.request(leaf, ask(60))
    ledger.settle(request, confirmed=tokens(10))
    for account in (root, leaf):
        assert (account.held(), account.used(), account.left_without_holds().tokens) == (
            ZERO,
            tokens(10),
            90,
        )


def test_a_hold_settled_without_a_bill_comes_back_whole() -> None:
    ledger, (root,) = tree(100)
    ledger.settle(ledger.request(root, ask(60)))
    assert root.used() == ZERO
    assert root.free == root.limit


def test_an_unconfirmed_bill_counts_like_a_confirmed_one() -> None:
    ledger, (root,) = tree(100)
    request = ledger.request(root, ask(60))
    ledger.settle(request, unconfirmed=tokens(60))
    assert (root.confirmed, root.unconfirmed) == (ZERO, tokens(60))
    assert refusal(ledger.request(root, ask(41))).left["tokens"] == 40


def test_an_unconfirmed_bill_is_at_most_its_hold() -> None:
    ledger, (root,) = tree(100)
    request = ledger.request(root, ask(60))
    with pytest.raises(InvariantError):
        ledger.settle(request, unconfirmed=tokens(61))
    assert root.held() == tokens(60)


# --- Rule 3: overdraft -----------------------------------------------------------------------------------


def test_a_bill_beyond_its_hold_is_recorded_as_overdraft_on_the_whole_path() -> None:
    ledger, (root, leaf) = tree(100, 100)
    ledger.settle(ledger.request(leaf, ask(60)), confirmed=tokens(130))
    for account in (root, leaf):
        assert (account.confirmed, account.overdraft) == (tokens(130), tokens(70))


def test_an_overdraft_blocks_the_next_hold() -> None:
    ledger, (root,) = tree(100)
    ledger.settle(ledger.request(root, ask(60)), confirmed=tokens(130))
    error = refusal(ledger.request(root, ask(1)))
    assert str(error) == "the budget of the account 0 is too low: 1 tokens wanted, 0 left"


def test_what_wants_nothing_of_an_overdrawn_unit_is_not_stopped_by_it() -> None:
    ledger = Ledger()
    account = ledger.open_account("run", Amounts(tokens=100, child_runs=1))
    ledger.settle(ledger.request(account, ask(60)), confirmed=tokens(130))
    assert ledger.request(account, Ask(fixed=Amounts(child_runs=1))).standing is Standing.GRANTED


# --- Rule 4: settled exactly once ------------------------------------------------------------------------


def test_a_hold_is_settled_exactly_once() -> None:
    ledger, (root,) = tree(100)
    request = ledger.request(root, ask(60))
    ledger.settle(request, confirmed=tokens(10))
    with pytest.raises(InvariantError):
        ledger.settle(request, confirmed=tokens(10))
    assert root.used() == tokens(10)


def test_what_holds_nothing_cannot_be_settled() -> None:
    ledger, (root,) = tree(100)
    ledger.request(root, ask(60))
    waiting, refused = ledger.request(root, ask(60)), ledger.request(root, ask(101))
    withdrawn = ledger.request(root, ask(60))
    ledger.give_up(withdrawn)
    for request in (waiting, refused, withdrawn):
        with pytest.raises(InvariantError):
            ledger.settle(request)


# --- Rule 5: refused or waiting --------------------------------------------------------------------------


def test_too_little_even_without_holds_is_refused_at_once() -> None:
    ledger, (root,) = tree(100)
    ledger.request(root, ask(60))
    error = refusal(ledger.request(root, ask(101)))
    assert (error.account, error.wanted["tokens"], error.left["tokens"]) == ("account 0", 101, 100)


def test_a_refusal_names_the_outermost_account_that_is_short() -> None:
    ledger, (_, middle, leaf) = tree(1_000, 50, 20)
    assert middle.scope == "account 1"
    assert refusal(ledger.request(leaf, ask(60))).account == "account 1"
    assert refusal(ledger.request(leaf, ask(30))).account == "account 2"


def test_waiting_requests_are_served_first_in_first_out() -> None:
    ledger, (root,) = tree(100)
    served: list[int] = []
    hold = ledger.request(root, ask(100))
    for amount in (40, 50, 10):
        ledger.request(root, ask(amount), lambda request: served.append(request.amounts.tokens))
    assert served == []
    ledger.settle(hold)
    assert served == [40, 50, 10]


def test_a_small_request_does_not_overtake_a_large_one_on_the_same_account() -> None:
    ledger, (root,) = tree(100)
    ledger.request(root, ask(60))
    large, small = ledger.request(root, ask(60)), ledger.request(root, ask(1))
    assert (large.standing, small.standing) == (Standing.WAITING, Standing.WAITING)


def test_a_request_that_is_short_elsewhere_does_not_stand_in_the_way() -> None:
    ledger, (root, left) = tree(100, 20)
    right = ledger.open_account("right", tokens(100), root)
    ledger.request(left, ask(20))
    assert ledger.request(left, ask(20)).standing is Standing.WAITING
    assert ledger.request(right, ask(20)).standing is Standing.GRANTED


def test_a_waiting_request_holds_nothing() -> None:
    ledger, (root,) = tree(100)
    ledger.request(root, ask(60))
    ledger.request(root, ask(60))
    assert root.held() == tokens(60)


def test_a_waiting_request_that_becomes_impossible_is_refused_and_told() -> None:
    ledger, (root,) = tree(100)
    told: list[Request] = []
    hold = ledger.request(root, ask(60))
    waiting = ledger.request(root, ask(60), told.append)
    ledger.settle(hold, confirmed=tokens(60))
    assert told == [waiting]
    assert refusal(waiting).left["tokens"] == 40
    assert not ledger.waiting


def test_those_behind_a_refused_request_are_served_in_the_same_breath() -> None:
    ledger, (root,) = tree(100)
    hold = ledger.request(root, ask(60))
    large, small = ledger.request(root, ask(60)), ledger.request(root, ask(10))
    ledger.settle(hold, confirmed=tokens(60))
    assert (large.standing, small.standing) == (Standing.REFUSED, Standing.GRANTED)


def test_a_decision_is_told_once_and_only_to_those_who_had_to_wait() -> None:
    ledger, (root,) = tree(100)
    told: list[Request] = []
    first = ledger.request(root, ask(60), told.append)
    second = ledger.request(root, ask(60), told.append)
    ledger.request(root, ask(101), told.append)
    assert told == []
    ledger.settle(first)
    ledger.settle(second)
    assert told == [second]


def test_whoever_is_told_may_settle_and_ask_again_at_once() -> None:
    ledger, (root,) = tree(100)
    again: list[Request] = []

    def settle_and_ask(request: Request) -> None:
        ledger.settle(request, confirmed=tokens(60))
        again.append(ledger.request(root, ask(40)))

    hold = ledger.request(root, ask(60))
    ledger.request(root, ask(60), settle_and_ask)
    ledger.settle(hold)
    assert [request.standing for request in again] == [Standing.GRANTED]
    assert (root.used(), root.held()) == (tokens(60), tokens(40))


# --- Giving up -------------------------------------------------------------------------------------------


def test_giving_up_while_waiting_lets_those_behind_go_on() -> None:
    ledger, (root,) = tree(100)
    ledger.request(root, ask(60))
    large, small = ledger.request(root, ask(60)), ledger.request(root, ask(40))
    ledger.give_up(large)
    assert (large.standing, small.standing) == (Standing.WITHDRAWN, Standing.GRANTED)


def test_giving_up_what_was_just_granted_gives_it_back() -> None:
    ledger, (root,) = tree(100)
    request = ledger.request(root, ask(60))
    ledger.give_up(request)
    assert (root.held(), root.used()) == (ZERO, ZERO)


@pytest.mark.parametrize("times", [1, 2])
def test_giving_up_what_was_refused_or_withdrawn_changes_nothing(times: int) -> None:
    ledger, (root,) = tree(100)
    ledger.request(root, ask(60))
    refused, withdrawn = ledger.request(root, ask(101)), ledger.request(root, ask(60))
    for _ in range(times):
        ledger.give_up(refused)
        ledger.give_up(withdrawn)
    assert (refused.standing, withdrawn.standing) == (Standing.REFUSED, Standing.WITHDRAWN)
    assert root.held() == tokens(60)


def test_a_settled_hold_cannot_be_given_up() -> None:
    ledger, (root,) = tree(100)
    request = ledger.request(root, ask(60))
    ledger.settle(request, confirmed=tokens(60))
    with pytest.raises(InvariantError):
        ledger.give_up(request)


# --- Rule 6: output that may shrink ----------------------------------------------------------------------


def shrinking(amount: int, *, most: int, least: int, price: int = 0) -> Ask:
    return ask(amount, output_tokens=most, least_output_tokens=least, output_microusd_per_mtok=price)


def test_a_default_is_not_shrunk_when_it_fits() -> None:
    ledger, (root,) = tree(1_000)
    assert ledger.request(root, shrinking(100, most=900, least=50)).output_tokens == 900


def test_a_default_shrinks_to_what_is_left() -> None:
    ledger, (root,) = tree(1_000)
    request = ledger.request(root, shrinking(100, most=4_096, least=50))
    assert (request.standing, request.output_tokens, request.amounts.tokens) == (
        Standing.GRANTED,
        900,
        1_000,
    )


def test_a_default_does_not_shrink_because_of_open_holds_but_waits() -> None:
    ledger, (root,) = tree(1_000)
    hold = ledger.request(root, ask(500))
    request = ledger.request(root, shrinking(100, most=900, least=50))
    assert request.standing is Standing.WAITING
    ledger.settle(hold, confirmed=tokens(200))
    assert (request.standing, request.output_tokens) == (Standing.GRANTED, 700)


def test_a_default_that_would_shrink_below_its_least_is_refused() -> None:
    ledger, (root,) = tree(1_000)
    error = refusal(ledger.request(root, shrinking(100, most=4_096, least=901)))
    assert (error.wanted["tokens"], error.left["tokens"]) == (1_001, 1_000)


def test_an_explicit_output_is_never_changed() -> None:
    ledger, (root,) = tree(1_000)
    assert ledger.request(root, shrinking(100, most=901, least=901)).standing is Standing.REFUSED
    assert ledger.request(root, shrinking(100, most=900, least=900)).output_tokens == 900


def test_the_tightest_account_decides_how_far_a_default_shrinks() -> None:
    ledger, (_, leaf) = tree(1_000, 400)
    assert ledger.request(leaf, shrinking(100, most=4_096, least=50)).output_tokens == 300


def test_a_default_shrinks_to_what_its_price_allows_rounded_so_that_it_is_never_past_the_limit() -> None:
    ledger = Ledger()
    account = ledger.open_account("run", Amounts(UNLIMITED, 10, UNLIMITED, UNLIMITED))
    request = ledger.request(
        account,
        Ask(
            fixed=Amounts(cost_microusd=3, calls=1),
            output_tokens=1_000,
            least_output_tokens=1,
            output_microusd_per_mtok=1_500_000,
        ),
    )
    assert request.output_tokens == 4
    assert request.amounts.cost_microusd == 3 + 6


@given(price=st.integers(0, 10**9), output=st.integers(0, 10**6), left=st.integers(0, 10**9))
def test_whatever_output_is_found_to_fit_does_fit(price: int, output: int, left: int) -> None:
    wish = ask(0, output_tokens=output, output_microusd_per_mtok=price)
    room = Amounts(UNLIMITED, left, 0, 0)
    most = wish.most_output(room)
    assert 0 <= most <= output
    assert wish.at(most).fits(room)
    assert most == output or not wish.at(most + 1).fits(room)


# --- Rule 7: kept for the last answer --------------------------------------------------------------------


def test_what_is_kept_counts_as_used_for_everybody_but_the_last_answer() -> None:
    ledger, (root, child) = tree(100, 100)
    ledger.settle(ledger.request(root, ask(10, keep=tokens(40))), confirmed=tokens(10))
    assert refusal(ledger.request(child, ask(51))).left["tokens"] == 50
    assert refusal(ledger.request(root, ask(51))).left["tokens"] == 50
    assert ledger.request(root, ask(90, last_answer=True)).standing is Standing.GRANTED


def test_a_call_cannot_eat_what_it_is_meant_to_leave() -> None:
    ledger, (root,) = tree(100)
    error = refusal(ledger.request(root, ask(70, keep=tokens(40))))
    assert (error.wanted["tokens"], error.left["tokens"]) == (70, 60)
    assert root.kept == ZERO


def test_a_call_that_keeps_more_than_before_is_measured_against_the_new_part_alone() -> None:
    ledger, (root,) = tree(100)
    ledger.settle(ledger.request(root, ask(10, keep=tokens(40))))
    assert ledger.request(root, ask(50, keep=tokens(50))).standing is Standing.GRANTED
    assert root.kept == tokens(50)


def test_what_a_waiting_call_would_keep_is_not_kept_yet() -> None:
    ledger, (root,) = tree(100)
    hold = ledger.request(root, ask(60))
    waiting = ledger.request(root, ask(30, keep=tokens(40)))
    assert (waiting.standing, root.kept) == (Standing.WAITING, ZERO)
    ledger.settle(hold)
    assert (waiting.standing, root.kept) == (Standing.GRANTED, tokens(40))


def test_an_output_shrinks_so_that_what_is_kept_stays() -> None:
    ledger, (root,) = tree(100)
    wish = ask(10, keep=tokens(40), output_tokens=100, least_output_tokens=1)
    assert ledger.request(root, wish).output_tokens == 50


def test_the_last_answer_waits_for_open_holds_like_anybody() -> None:
    ledger, (root,) = tree(100)
    ledger.request(root, ask(60))
    assert ledger.request(root, ask(41, last_answer=True)).standing is Standing.WAITING


def test_keeping_more_refuses_those_who_can_then_never_be_served() -> None:
    ledger, (root, child) = tree(100, 45)
    told: list[Request] = []
    ledger.request(child, ask(10))
    waiting = ledger.request(child, ask(40), told.append)
    assert ledger.request(root, ask(5, keep=tokens(61))).standing is Standing.GRANTED
    assert told == [waiting]
    assert refusal(waiting).account == "account 0"


# --- Rule 8: limits ---------------------------------------------------------------------------------------


def test_a_child_with_a_higher_limit_still_has_its_parents() -> None:
    ledger, (_, child) = tree(100, 1_000)
    assert refusal(ledger.request(child, ask(101))).account == "account 0"


def test_a_limit_is_only_ever_raised() -> None:
    ledger, (root,) = tree(100)
    with pytest.raises(InvariantError):
        ledger.raise_limit(root, Amounts(99, UNLIMITED, UNLIMITED, UNLIMITED))


def test_raising_a_limit_serves_those_who_waited() -> None:
    ledger, (root,) = tree(100)
    ledger.request(root, ask(60))
    waiting = ledger.request(root, ask(60))
    ledger.raise_limit(root, Amounts(120, UNLIMITED, UNLIMITED, UNLIMITED))
    assert waiting.standing is Standing.GRANTED
    assert (root.held(), root.free.tokens) == (tokens(120), 0)


# --- Everything, in any order -----------------------------------------------------------------------------

amounts = st.builds(Amounts, *(st.integers(0, 60) for _ in Amounts._fields))


class LedgerMachine(RuleBasedStateMachine):
    """Any sequence of what callers may do; the rules hold after every step."""

    accounts: Bundle[Account] = Bundle("accounts")
    requests: Bundle[Request] = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.all_accounts: list[Account] = []
        self.all_requests: list[Request] = []
        self.told: list[Request] = []

    @initialize(target=accounts, limit=st.builds(Amounts, *(st.integers(50, 200) for _ in Amounts._fields)))
    def open_root(self, limit: Amounts) -> Account:
        return self._open(limit, None)

    @rule(
        target=accounts, parent=accounts, limit=st.builds(Amounts, *(st.integers(0, 150) for _ in range(4)))
    )
    def open_child(self, parent: Account, limit: Amounts) -> Account:
        return self._open(limit, parent)

    def _open(self, limit: Amounts, parent: Account | None) -> Account:
        account = self.ledger.open_account("run", limit, parent)
        self.all_accounts.append(account)
        return account

    @rule(
        target=requests,
        account=accounts,
        fixed=amounts,
        output=st.integers(0, 60),
        share=st.integers(0, 60),
        price=st.sampled_from([0, 1, 300_000, 1_000_000]),
        keep=st.none() | amounts,
        last_answer=st.booleans(),
    )
    def ask(  # noqa: PLR0917 - hypothesis names its arguments
        self,
        account: Account,
        fixed: Amounts,
        output: int,
        share: int,
        price: int,
        keep: Amounts | None,
        last_answer: bool,
    ) -> Request:
        wish = Ask(
            fixed=fixed,
            output_tokens=output,
            least_output_tokens=min(output, share),
            output_microusd_per_mtok=price,
            keep=None if last_answer else keep,
            last_answer=last_answer,
        )
        request = self.ledger.request(account, wish, self.told.append)
        self.all_requests.append(request)
        return request

    @rule(request=requests, billed=amounts, unconfirmed=st.booleans())
    def settle(self, request: Request, billed: Amounts, unconfirmed: bool) -> None:
        if request.standing is not Standing.GRANTED or request.settled:
            with pytest.raises(InvariantError):
                self.ledger.settle(request, confirmed=billed)
        elif unconfirmed:
            self.ledger.settle(request, unconfirmed=request.amounts)
        else:
            self.ledger.settle(request, confirmed=billed)

    @rule(request=requests)
    def give_up(self, request: Request) -> None:
        if not request.settled:
            self.ledger.give_up(request)

    @rule(account=accounts, more=amounts)
    def raise_limit(self, account: Account, more: Amounts) -> None:
        self.ledger.raise_limit(account, account.limit.plus(more))

    @invariant()
    def no_account_is_past_its_limit(self) -> None:
        for account in self.all_accounts:
            spent = account.used().plus(account.held())
            assert all(
                mine <= most for mine, most in zip(spent, account.limit.plus(account.overdraft), strict=True)
            )

    @invariant()
    def what_is_held_is_the_sum_of_open_grants(self) -> None:
        for account in self.all_accounts:
            held = ZERO
            for request in self.all_requests:
                is_open = request.standing is Standing.GRANTED and not request.settled
                if is_open and account in request.account.path:
                    held = held.plus(request.amounts)
            assert account.held() == held

    @invariant()
    def nobody_waits_who_could_go_on_or_never_can(self) -> None:
        """Decided anew from the rules' text: by what is free, and by who came before."""
        blocked: set[Account] = set()
        for request in self.ledger.waiting:
            assert request.standing is Standing.WAITING
            short = {account for account in request.account.path if self._is_short(request, account)}
            assert short or blocked & set(request.account.path)
            blocked |= short
            least = request.ask.at(request.ask.least_output_tokens)
            for account in request.account.path:
                left = account.limit.minus(account.used()).minus(self._kept(request, account))
                assert all(wanted <= max(0, room) for wanted, room in zip(least, left, strict=True))

    def _is_short(self, request: Request, account: Account) -> bool:
        room = account.limit.minus(account.used()).minus(account.held()).minus(self._kept(request, account))
        return any(wanted > max(0, spare) for wanted, spare in zip(request.amounts, room, strict=True))

    @staticmethod
    def _kept(request: Request, account: Account) -> Amounts:
        if request.ask.last_answer:
            return ZERO
        return account.kept if request.ask.keep is None else request.ask.keep

    @invariant()
    def an_output_lies_between_what_was_asked_and_the_least(self) -> None:
        for request in self.all_requests:
            if request.standing is Standing.GRANTED:
                assert request.ask.least_output_tokens <= request.output_tokens <= request.ask.output_tokens
                assert request.amounts == request.ask.at(request.output_tokens)

    @invariant()
    def a_decision_is_told_once_and_never_to_those_who_still_wait(self) -> None:
        assert len(set(map(id, self.told))) == len(self.told)
        assert all(request.standing in {Standing.GRANTED, Standing.REFUSED} for request in self.told)

    def teardown(self) -> None:
        for request in self.all_requests:
            if not request.settled:
                self.ledger.give_up(request)
        assert not self.ledger.waiting
        assert all(account.held() == ZERO for account in self.all_accounts)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
