/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The one type for results, and the only way out of a program.
 *
 * Every stage returns an enum outcome: OUT_CONTINUE hands over to the next stage,
 * anything else ends the pipeline. The verdict is a property of the number's range.
 * internal/policy/outcome.go documents each name; a test compares the two lists.
 */
#pragma once

enum outcome {
	OUT_CONTINUE = 0,

	OUT_PASS_NOT_IP = 1,
	OUT_PASS_DISABLED = 2,
	OUT_PASS_HOST = 3,
	OUT_PASS_SOURCE = 4,
	OUT_PASS_MULTICAST = 5,
	OUT_PASS_NATIVE = 6,
	OUT_PASS_NONMASQ = 7,
	OUT_PASS_POD = 8,
	OUT_PASS_NODE = 9,
	OUT_PASS_INBOUND = 10,
	OUT_PASS_PROTOCOL = 11,
	OUT_PASS_DEVICE = 12,
	OUT_PASS_NO_MAPPING = 13,
	OUT_PASS_INBOUND_FULL = 14,
	OUT_PASS_TRANSLATED = 15,
	OUT_PASS_FRAGMENT = 16,
	OUT_PASS_HANDOVER = 17,

	OUT_MASQ_NEW = 32,
	OUT_MASQ_KNOWN = 33,
	OUT_MASQ_HOST = 34,
	OUT_MASQ_ERROR = 35,
	OUT_MASQ_FRAGMENT = 36,

	OUT_HOLD_FRAGMENT = 60,

	OUT_DROP_BAD_HEADER = 64,
	OUT_DROP_NO_PORT = 65,
	OUT_DROP_NO_ADDRESS = 66,
	OUT_DROP_TABLE_FULL = 67,
	OUT_DROP_QUOTA = 68,
	OUT_DROP_PROTOCOL = 69,
	OUT_DROP_FRAGMENT = 70,
	OUT_DROP_STRAY = 71,
	OUT_DROP_EXTENSION = 72,
	OUT_DROP_MAP_ERROR = 73,
	OUT_DROP_REWRITE = 74,
	OUT_DROP_NO_POLICY = 75,
	OUT_DROP_RATE = 76,
	OUT_DROP_HANDOVER = 77,

	OUT_SLOTS = 96,
};

#define FIRST_MASQ OUT_MASQ_NEW
#define FIRST_HOLD OUT_HOLD_FRAGMENT
#define FIRST_DROP OUT_DROP_BAD_HEADER
