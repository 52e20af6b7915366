/* A plugin of QEMU that counts the instructions of an emulated program: what a processor that is not here has to do.
 *
 *     gcc -O2 -shared -fPIC -o /tmp/instructions.so benchmarks/instructions.c
 *     tools/aarch64.sh FOLDER tests/net/test_wire.py     # makes FOLDER
 *     PYTHONPATH=FOLDER/work:FOLDER/site PYTHONHASHSEED=0 qemu-aarch64 -plugin /tmp/instructions.so -L FOLDER/sys \
 *         FOLDER/sys/usr/bin/python3.* -c 'what is to be counted'
 *
 * The count goes to stderr at the end. Count twice, with more of the work, and take the difference: the start of
 * Python alone is some hundred million. For programs of one thread: threads would count at the same time. The
 * declarations are those of QEMU's qemu-plugin.h, version 1 (QEMU 4.2 to 8), which Debian does not package.
 */

#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define EXPORT __attribute__((visibility("default")))
#define ADD_U64 0

struct qemu_plugin_tb;

void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*translated)(uint64_t, struct qemu_plugin_tb *));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, int operation, void *value, uint64_t by);
void qemu_plugin_register_atexit_cb(uint64_t id, void (*ended)(uint64_t, void *), void *data);

EXPORT int qemu_plugin_version = 1;

static uint64_t n_instructions;

static void translated(uint64_t id, struct qemu_plugin_tb *block) {
    (void)id;
    size_t n = qemu_plugin_tb_n_insns(block);
    qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &n_instructions, n);
}

static void ended(uint64_t id, void *data) {
    (void)id, (void)data;
    fprintf(stderr, "%" PRIu64 " instructions\n", n_instructions);
}

EXPORT int qemu_plugin_install(uint64_t id, const void *machine, int argc, char **argv) {
    (void)machine, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
