"""Helpers of the tests: `from helpers.x import y`. No test file imports another one."""
