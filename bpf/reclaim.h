/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Expiry while no agent is there to ask for it (decision 16). A timer walks one table a time and
 * lets the reaper's rules decide. It is part of no packet's path: the programs that start it are
 * loaded where the kernel has what they need, and an error there costs nothing but this.
 */
#pragma once

#include "reap.h"

#define UNUSED __attribute__((unused))

/* Linux 6.10. */
struct bpf_wq {
	__u64 __opaque[2];
} __attribute__((aligned(8)));

extern int bpf_wq_init(struct bpf_wq *wq, void *map, unsigned int flags) __ksym;
extern int bpf_wq_set_callback_impl(struct bpf_wq *wq,
				    int(callback)(void *map, int *key, void *value),
				    unsigned int flags, void *aux) __ksym;
extern int bpf_wq_start(struct bpf_wq *wq, unsigned int flags) __ksym;

enum reclaim_by { RECLAIM_BY_TIMER = 1, RECLAIM_BY_WORK = 2 };

/* The timer lives as long as this map is pinned. User space never writes it: that would end it. */
struct reclaim_state {
	struct bpf_timer timer;
	struct bpf_wq work;
	__u32 by; /* enum reclaim_by; 0: not started */
	__u32 turn; /* enum reclaim_turn */
	__u32 skip; /* candidates that earlier walks of this table have looked at */
	__u32 runs;
	__u64 removed;
	__u64 took, longest; /* ns of a walk */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct reclaim_state);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} reclaim SEC(".maps");

/* The tables in turn. */
enum reclaim_turn {
	RECLAIM_FORWARD4 = 0,
	RECLAIM_FORWARD6,
	RECLAIM_INBOUND4,
	RECLAIM_INBOUND6,
	RECLAIM_REVERSE4,
	RECLAIM_REVERSE6,
	RECLAIM_TURNS,
};

/* One walk. A table is always walked from its beginning; candidates are those that were silent for
 * longer than the shortest timer, or than a dead entry is kept, and only a number of them is
 * looked at. */
struct reclaim_run {
	__u32 now;
	__u32 silent;
	__u32 skip, limit; /* of the candidates */
	__u32 met, removed;
	__u32 passed; /* reverse entries */
};

static __noinline int reclaim_decide(const struct reap_record *rec, __u32 now)
{
	__u32 generation = 0;
	struct setting *set = policy_settings(&generation);

	if (!set)
		return 0;
	switch (rec->table) {
	case REAP_FORWARD:
		return reap_forward(rec, set, now);
	case REAP_INBOUND:
		return reap_inbound(rec, set, now);
	}
	return reap_reverse(rec, now);
}

static __always_inline bool reclaim_is_silent(const struct reclaim_run *run, __u32 seen)
{
	return (__s32)(run->now - seen) > (__s32)run->silent;
}

static __always_inline long reclaim_visit(struct reclaim_run *run, struct reap_record *rec,
					  const struct tuple4 *k4, const struct tuple *k,
					  bool candidate)
{
	if (!candidate || run->met++ < run->skip)
		return 0;
	if (k4) {
		addr_from_ipv4(&rec->key.local, k4->local);
		addr_from_ipv4(&rec->key.remote, k4->remote);
		rec->key.lport = k4->lport;
		rec->key.rport = k4->rport;
		rec->key.proto = k4->proto;
	} else {
		rec->key = *k;
	}
	run->removed += reclaim_decide(rec, run->now);
	return run->met - run->skip >= run->limit; /* 1 ends the walk */
}

static long reclaim_forward4(UNUSED void *map, struct tuple4 *k, struct flow4 *v,
			     struct reclaim_run *run)
{
	struct reap_record rec = { .table = REAP_FORWARD, .percent = 100 };

	return reclaim_visit(run, &rec, k, NULL, reclaim_is_silent(run, v->flow.seen));
}

static long reclaim_forward6(UNUSED void *map, struct tuple *k, struct flow6 *v,
			     struct reclaim_run *run)
{
	struct reap_record rec = { .table = REAP_FORWARD, .percent = 100 };

	return reclaim_visit(run, &rec, NULL, k, reclaim_is_silent(run, v->flow.seen));
}

static long reclaim_inbound4(UNUSED void *map, struct tuple4 *k, struct inbound *v,
			     struct reclaim_run *run)
{
	struct reap_record rec = { .table = REAP_INBOUND, .percent = 100 };

	return reclaim_visit(run, &rec, k, NULL, reclaim_is_silent(run, v->seen));
}

static long reclaim_inbound6(UNUSED void *map, struct tuple *k, struct inbound *v,
			     struct reclaim_run *run)
{
	struct reap_record rec = { .table = REAP_INBOUND, .percent = 100 };

	return reclaim_visit(run, &rec, NULL, k, reclaim_is_silent(run, v->seen));
}

/* Dead entries go after their time; where the table is nearly full, those beyond the mark at once.
 * So do halves that have lost the other. */
static __always_inline bool reclaim_reverse(struct reclaim_run *run, struct reap_record *rec,
					    const struct flow *f)
{
	rec->table = REAP_REVERSE;
	rec->percent = run->passed++ < reclaim_room ? 100 : 0;
	return reclaim_is_silent(run, f->seen) || (f->bits & FLOW_DEAD && !rec->percent);
}

static long reclaim_reverse4(UNUSED void *map, struct tuple4 *k, struct flow4 *v,
			     struct reclaim_run *run)
{
	struct reap_record rec = {};
	bool candidate = reclaim_reverse(run, &rec, &v->flow);

	return reclaim_visit(run, &rec, k, NULL, candidate);
}

static long reclaim_reverse6(UNUSED void *map, struct tuple *k, struct flow6 *v,
			     struct reclaim_run *run)
{
	struct reap_record rec = {};
	bool candidate = reclaim_reverse(run, &rec, &v->flow);

	return reclaim_visit(run, &rec, NULL, k, candidate);
}

static __always_inline __u32 reclaim_shortest(const struct setting *set)
{
	__u32 shortest = ~0U >> 1;

	for (int i = 0; i < TIMERS; i++)
		if (set->timeout[i] < shortest)
			shortest = set->timeout[i];
	return shortest;
}

/* Is there no agent? It beats its heart with each sweep. */
static __always_inline bool reclaim_wanted(__u32 now)
{
	__u32 zero = 0;
	struct state *st = bpf_map_lookup_elem(&control, &zero);

	return st && st->active != ~0U && (__s32)(now - st->heartbeat) > (__s32)reclaim_after;
}

/* A call of its own for each table: clang would merge them into one, and the verifier of 6.1 refuses a
 * call that gets different maps ("tail_call abusing map_ptr"). */
#define RECLAIM_WALK(table)                                                                        \
	do {                                                                                       \
		bpf_for_each_map_elem(&table, reclaim_##table, &run, 0);                           \
		asm volatile("r0 = %0" ::"i"(__COUNTER__) : "r0");                                 \
	} while (0)

static __noinline int reclaim_walk(struct reclaim_state *r, __u32 limit)
{
	__u64 start = bpf_ktime_get_ns();
	struct reclaim_run run = { .now = start / 1000000000ULL };
	struct setting *set;
	__u32 generation = 0;

	if (!r)
		return 0;
	r->runs++;
	if (!reclaim_wanted(run.now))
		return 0;
	set = policy_settings(&generation);
	if (!set)
		return 0;
	run.silent = r->turn < RECLAIM_REVERSE4 ? reclaim_shortest(set) : QUARANTINE_SECONDS;
	run.limit = limit;
	run.skip = r->skip;
	switch (r->turn) {
	case RECLAIM_FORWARD4:
		RECLAIM_WALK(forward4);
		break;
	case RECLAIM_FORWARD6:
		RECLAIM_WALK(forward6);
		break;
	case RECLAIM_INBOUND4:
		RECLAIM_WALK(inbound4);
		break;
	case RECLAIM_INBOUND6:
		RECLAIM_WALK(inbound6);
		break;
	case RECLAIM_REVERSE4:
		RECLAIM_WALK(reverse4);
		break;
	default:
		RECLAIM_WALK(reverse6);
	}
	if (run.met >= run.skip && run.met - run.skip >= limit) {
		r->skip = run.met - run.removed; /* the rest comes with the next walk */
	} else {
		r->skip = 0;
		r->turn = (r->turn + 1) % RECLAIM_TURNS;
	}
	r->removed += run.removed;
	r->took = bpf_ktime_get_ns() - start;
	if (r->took > r->longest)
		r->longest = r->took;
	return 0;
}

/* In a soft interrupt: packets of this CPU wait. */
static int reclaim_on_timer(UNUSED void *map, UNUSED __u32 *key, struct reclaim_state *r)
{
	reclaim_walk(r, RECLAIM_BATCH_TIMER);
	bpf_timer_start(&r->timer, reclaim_period, 0);
	return 0;
}

static int reclaim_in_work(UNUSED void *map, UNUSED int *key, void *value)
{
	return reclaim_walk(value, RECLAIM_BATCH_WORK);
}

/* The walk runs in a thread, where packets interrupt it. */
static int reclaim_start_work(UNUSED void *map, UNUSED __u32 *key, struct reclaim_state *r)
{
	bpf_wq_start(&r->work, 0);
	bpf_timer_start(&r->timer, reclaim_period, 0);
	return 0;
}

#define RECLAIM_CLOCK_MONOTONIC 1

/* Starts the timer, or gives it this version's program: 0, or a negative errno. */
static __always_inline int reclaim_arm(bool work)
{
	__u32 zero = 0;
	struct reclaim_state *r = bpf_map_lookup_elem(&reclaim, &zero);
	long err;

	if (!r)
		return -ENOENT;
	err = bpf_timer_init(&r->timer, &reclaim, RECLAIM_CLOCK_MONOTONIC);
	if (err && err != -EBUSY) /* it has been by an earlier agent */
		return err;
	if (work) {
		err = bpf_wq_init(&r->work, &reclaim, 0);
		if (err && err != -EBUSY)
			return err;
		err = bpf_wq_set_callback_impl(&r->work, reclaim_in_work, 0, NULL);
		if (!err)
			err = bpf_timer_set_callback(&r->timer, reclaim_start_work);
	} else {
		err = bpf_timer_set_callback(&r->timer, reclaim_on_timer);
	}
	err = err ?: bpf_timer_start(&r->timer, reclaim_period, 0);
	if (!err)
		r->by = work ? RECLAIM_BY_WORK : RECLAIM_BY_TIMER;
	return err;
}
